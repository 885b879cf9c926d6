"""seqio tasks over text, and their tables.

    files or texts -> documents, split by document -> seqio Task (tokens) -> Mixture -> packed Table

A source is read once. What training reads afterwards is the table, by row.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from a3_jax.data import documents, embedded
from a3_jax.data.prepared_manifest import HELDOUT, TRAIN
from a3_jax.data.table import Table, pack
from a3_jax.data.tensorflow_host import seqio, tf
from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer

FEATURE = "targets"  # seqio's name for what a decoder predicts
HOLDOUT = 0.05

_TEXTS_AT_ONCE = 512


class TextVocabulary(seqio.Vocabulary):
    """A seqio `Vocabulary` over any `Tokenizer`: a Hugging Face `tokenizer.json`, or bytes.

    seqio's `pad_id` is always 0, which may be a real token here. Nothing in this project reads it:
    padding is where `segment_ids` is 0.

    Attributes:
      failure: the last InputError of the tokenizer. TensorFlow turns exceptions into its own, so
        whoever reads a dataset looks here for what really happened.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str = "auto"):
        super().__init__(extra_ids=0)
        self.tokenizer, self.bos = tokenizer, bos
        self.failure: InputError | None = None

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s, self.bos)

    def _decode(self, ids) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """[n] int32 of one text; of a vector of texts, encoded together, a ragged [texts, n]."""
        ids, lengths = tf.numpy_function(self._encode_together, [tf.reshape(s, [-1])], [tf.int32, tf.int64])
        ids.set_shape([None])
        lengths.set_shape([None])
        if s.shape.rank == 0:
            return ids
        return tf.RaggedTensor.from_row_lengths(ids, lengths)  # pyright: ignore[reportAttributeAccessIssue]

    def _encode_together(self, texts) -> tuple[np.ndarray, np.ndarray]:
        try:
            encoded = self.tokenizer.encode_batch([text.decode() for text in texts], self.bos)
        except InputError as error:
            self.failure = error
            raise
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        return np.array([token for ids in encoded for token in ids], np.int32), lengths

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns the text of [n] ids; of [texts, n] a vector of texts."""
        if ids.shape.rank == 2:
            return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)
        # An object array, since NumPy's bytes lose zero bytes at their end.
        text = tf.numpy_function(
            lambda tokens: np.array(self._decode(tokens).encode(), object), [ids], tf.string
        )
        text.set_shape([])
        return text

    def __eq__(self, other) -> bool:
        if not isinstance(other, TextVocabulary):
            return NotImplemented
        return (self.tokenizer.fingerprint, self.bos) == (other.tokenizer.fingerprint, other.bos)

    def __hash__(self) -> int:
        return hash((self.tokenizer.fingerprint, self.bos))

    def __repr__(self) -> str:
        return f"TextVocabulary(size={self.vocab_size}, bos={self.bos!r})"


@dataclasses.dataclass(frozen=True)
class Data:
    """Tables of one run: training rows and, where the source has enough documents, held-out ones."""

    train: Table
    heldout: Table | None


def open_data(
    data: str | Sequence[str],
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    packing: bool = True,
    holdout: float | int = HOLDOUT,
) -> Data:
    """Reads, tokenises and packs what a run trains on.

    Args:
      data: a `.jsonl` or `.txt` file, a glob, a list of both, or "" for the embedded corpus.
      tokenizer: makes the ids; BOS is there where it adds one.
      seq_len: tokens in a row.
      packing: several documents a row; else one, cut off at `seq_len`.
      holdout: share (below 1) or number of documents of each file for the held-out table, at least
        one of those that hold two or more; 0 for none. The embedded corpus has its own split.
    """
    if data:
        files = documents.find_files(data)
        splits = {name: split_documents(documents.read_documents(name), holdout) for name in files}
    else:
        splits = {"embedded": embedded_source()}
    vocabulary = TextVocabulary(tokenizer)
    name = register(splits, vocabulary)
    train = read_table(name, TRAIN, seq_len, packing)
    if train is None:
        raise InputError("holds no token to train on", field="data")
    return Data(train, read_table(name, HELDOUT, seq_len, packing))


def embedded_source() -> dict[str, tuple[str, ...]]:
    """Returns the documents of the embedded corpus by split."""
    return {split: tuple(embedded.stories(split)) for split in (TRAIN, HELDOUT)}


def split_documents(documents: Sequence[str], holdout: float | int = HOLDOUT) -> dict[str, tuple[str, ...]]:
    """Documents by split, in their order. Which are held out depends on their text alone.

    Equal texts go the same way, so that no held-out document was trained on.

    Args:
      documents: the texts.
      holdout: share (below 1) or number of distinct texts to hold out; at least one remains.
    """
    if holdout < 0 or (holdout >= 1 and holdout != int(holdout)):
        raise InputError(
            f"must be a share below 1 or a number of documents, got {holdout!r}", field="holdout"
        )
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest() for text in documents]
    distinct = sorted(set(digests))
    wanted = int(holdout) if holdout >= 1 else -(-len(distinct) * holdout // 1)
    held = set(distinct[: int(min(wanted, len(distinct) - 1))])
    return {
        TRAIN: tuple(text for text, digest in zip(documents, digests) if digest not in held),
        HELDOUT: tuple(text for text, digest in zip(documents, digests) if digest in held),
    }


def register(splits: Mapping[str, Mapping[str, Sequence[str]]], vocabulary: TextVocabulary) -> str:
    """Registers a seqio Task for each source and a Mixture of them, by their number of documents.

    Args:
      splits: documents by split, by name of the source.
      vocabulary: of all of them.

    Returns:
      The mixture's name. It depends on names and documents, so the same data registers once.
    """
    tasks = [_register_task(name, documents, vocabulary) for name, documents in splits.items()]
    mixture = "a3_mixture_" + digest_of(*tasks)
    if mixture not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(mixture, tasks, default_rate=seqio.mixing_rate_num_examples)
    return mixture


def read_table(name: str, split: str, seq_len: int, packing: bool = True) -> Table | None:
    """Returns the packed rows of a registered task or mixture with a feature "targets"; None if it has none.

    Of a mixture, each document of each task is read once: rates only matter where one samples. Python's `if`
    on a tensor is not for the functions of its preprocessors.
    """
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    documents = [ids for task in tasks if split in task.splits for ids in _token_ids(task, split)]
    table = pack(documents, seq_len, packing)
    return table if table.num_rows else None


def _token_ids(task: seqio.Task, split: str) -> list[np.ndarray]:
    """[n] int32 for each document of a task."""
    # To rewrite the functions for TensorFlow takes longer than to run them.
    dataset = tf.autograph.experimental.do_not_convert(task.get_dataset)(None, split, shuffle=False)
    documents = []
    try:
        for example in dataset.ragged_batch(_TEXTS_AT_ONCE):  # fetched one by one, each takes a millisecond
            ragged = example[FEATURE]
            documents += np.split(ragged.values.numpy(), ragged.row_splits.numpy()[1:-1])
    except tf.errors.OpError as error:
        failure = getattr(task.output_features[FEATURE].vocabulary, "failure", None)
        raise failure or error from error
    return documents


def _register_task(name: str, documents: Mapping[str, Sequence[str]], vocabulary: TextVocabulary) -> str:
    texts = [text for split in documents for text in (split, *documents[split])]
    task = "a3_" + digest_of(name, vocabulary.tokenizer.fingerprint, vocabulary.bos, *texts)
    if task in seqio.TaskRegistry.names():
        return task

    def dataset(split, shuffle_files=False, seed=None):
        del shuffle_files, seed  # the order of examples comes from the table, never from here
        texts = tf.constant(documents[split], tf.string)
        return tf.data.Dataset.from_tensor_slices(texts).map(lambda text: {FEATURE: text})

    counts = {split: len(documents[split]) for split in documents}
    seqio.TaskRegistry.add(
        task,
        source=seqio.FunctionDataSource(dataset, splits=list(documents), num_input_examples=counts),  # pyright: ignore[reportArgumentType]
        preprocessors=[_tokenize],
        output_features={FEATURE: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)},
    )
    return task


def _tokenize(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
    """seqio's tokenizer, many texts at a time: one by one, calls cost more than the tokens."""
    batches = dataset.batch(_TEXTS_AT_ONCE)
    return seqio.preprocessors.tokenize(batches, output_features, copy_pretokenized=False).unbatch()


def digest_of(*texts: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
