"""Our tokenizers as seqio vocabularies."""

import numpy as np

from a3_jax.data.tensorflow_host import seqio, tf
from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer


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
