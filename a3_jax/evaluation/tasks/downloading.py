"""Task files from the Hugging Face hub, for those who ask: the one place here that uses the network."""

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks.catalogue import Task
from a3_jax.paths import local_path


def fetch_data(task: Task, data_dir) -> None:
    """Fetches a task's files into DATA_DIR/TASK.

    Raises:
      InputError: they are not on the hub, huggingface_hub is not installed, or the download fails.
    """
    if task.hub is None:
        raise InputError(f"{task.name} is not on the hub: {task.where}", field="download")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        message = "needs the package huggingface_hub: pip install huggingface_hub"
        raise InputError(message, field="download") from error
    name, patterns = task.hub
    place = local_path(data_dir, "the hub's client") / task.name
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns), local_dir=str(place))
    except Exception as error:  # whatever the hub's client, the network or the disk raises
        raise InputError(f"{name} can't be fetched: {type(error).__name__}: {error}", file=place) from error
