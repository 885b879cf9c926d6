"""`python -m tests.walks`: how many of our files data passes through on its three ways, by a call trace.

    a text to a gradient        from the first byte read to the gradient of the loss
    a prompt to a token         from a line of JSON to the text that is filled in
    a checkpoint to parameters  from a Hugging Face directory to arrays

Files of checks, errors, paths and progress are on every way and are not counted.
"""

import collections
import contextlib
import functools
import pathlib
import sys
import tempfile
import threading

PACKAGE = pathlib.Path(__file__).parent.parent / "a3_jax"
EVERYWHERE = {"checks.py", "errors.py", "paths.py", "progress.py", "console.py"}


@contextlib.contextmanager
def traced():
    """Yields a counter of calls by file of ours, filled when the block ends."""
    calls: collections.Counter[str] = collections.Counter()
    names: dict[str, str | None] = {}

    def on_event(frame, event, _):
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename not in names:
            path = pathlib.Path(code.co_filename)
            ours = path.is_relative_to(PACKAGE) and path.name not in EVERYWHERE
            names[code.co_filename] = str(path.relative_to(PACKAGE)) if ours else None
        name = names[code.co_filename]
        if name is not None and code.co_name not in ("<module>", "<lambda>"):
            calls[name] += 1

    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def text_to_gradient(directory) -> list[str]:
    """Returns the files on the way of a text to a gradient."""
    import jax

    from a3_jax.data import feature_converter
    from a3_jax.data.batches import BatchPlan
    from a3_jax.data.seqio_tasks import open_data
    from a3_jax.model.sharding import batch_sharding
    from a3_jax.model.two_stream import init_params
    from a3_jax.training import setup, step
    from a3_jax.training.config import RunConfig
    from tests.training_fixtures import tiny_run

    path = pathlib.Path(directory) / "text.txt"
    path.write_text("The cat sat on the mat.\n\n" * 50)
    run = RunConfig.from_config(tiny_run(str(path)))
    mesh = setup.open_mesh(run, jax.devices()[:1])
    with jax.set_mesh(mesh):
        start = setup.init_from_config(run, mesh)
        model, params = setup.make_model(run, start.model), init_params(start.model, jax.random.key(0))
        with traced() as calls:
            data = open_data(run.data, start.tokenizer, run.seq_len, packing=True, holdout=run.holdout)
            rows = next(feature_converter.stream(BatchPlan(data.train, run.stages, run.seed, run.batch_size)))
            batch = setup.device_batch(batch_sharding(mesh), 1, rows)
            loss = functools.partial(step.step_loss("any_order"), model)
            step.gradients(loss, params, batch, 1)
    return sorted(calls)


def prompt_to_token(directory) -> list[str]:
    """Returns the files on the way of a prompt to a token."""
    from a3_jax import generate
    from tests.tiny_checkpoint import with_bytes

    checkpoint = with_bytes()
    with traced() as calls:
        generate(checkpoint, [{"text": "The [[3]] sat."}])
    return sorted(calls)


def checkpoint_to_parameters(directory) -> list[str]:
    """Returns the files on the way of a Hugging Face checkpoint to parameters."""
    from a3_jax import open_checkpoint
    from tests.tiny_hf import write_tiny_llama

    write_tiny_llama(pathlib.Path(directory) / "llama")
    with traced() as calls:
        open_checkpoint(pathlib.Path(directory) / "llama")
    return sorted(calls)


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        for walk in (text_to_gradient, prompt_to_token, checkpoint_to_parameters):
            files = walk(directory)
            print(f"{walk.__name__.replace('_', ' ')}: {len(files)} files: {' '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
