"""Cuts batches from a token store, in plain numpy: pure functions of examples and random bits.

An objective numbers its examples 0..len-1. ``batch(examples, position)`` turns example numbers
into arrays; ``position`` is the place of the first one in the never-ending stream of the run and
selects the random bits, so a batch does not depend on what was drawn before it.
"""

import functools
import math

import numpy as np

from train.data.store import TokenStore

MASK_RATE = 0.15


class CausalBlocks:
    """GPT-2: the documents, an end-of-text token after each, as one stream cut every ``seq_len``.

    Batches hold ``input_ids`` and ``labels``, both (B, S) int32; ``labels`` is the stream one token
    further on. Blocks cross document borders, as in the GPT-2 paper.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: a sequence needs at least one token")
        self.num_examples = (store.num_tokens - 1) // seq_len
        _check_enough(store, seq_len, self.num_examples)
        used = self.num_examples * seq_len
        self._inputs = store.tokens[:used].reshape(-1, seq_len)
        self._labels = store.tokens[1 : used + 1].reshape(-1, seq_len)

    def batch(self, examples: np.ndarray, position: int) -> dict[str, np.ndarray]:
        del position
        return {
            "input_ids": self._inputs[examples].astype(np.int32),
            "labels": self._labels[examples].astype(np.int32),
        }


class MaskedPairs:
    """BERT: ``[CLS] A [SEP] B [SEP]`` with masked tokens to recover and a next-sentence label.

    Every document is cut greedily into chunks of whole sentences that fit a sequence, without loss
    or overlap: those are the examples. A chunk is split at a random sentence border into A and B.
    For half of the draws B gives way to the second part of a chunk of another document, split at
    the same fraction so that lengths and endings say nothing about the label (1: B is not what
    follows A, the convention of BERT). Where A and B are too long together, A loses its beginning
    or B its end, whichever is longer.

    Of the text tokens 15 %, at least one and at most ``max_predictions``, are to be predicted; 80 %
    of these become [MASK], 10 % another ordinary token, 10 % stay (Devlin et al. 2019, 3.1 and A.1).

    Batches hold int32 ``input_ids``, ``token_type_ids`` (B, S), ``lengths``, ``nsp_labels`` (B,),
    ``mlm_positions``, ``mlm_labels`` (B, P) in ascending order of position, and float32
    ``mlm_weights`` (B, P), 0 where a row has fewer than P predictions.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, max_predictions: int | None = None, seed: int = 0
    ):
        if seq_len < 8:
            raise ValueError(f"seq_len={seq_len}: sentence pairs need at least 8 tokens")
        if max_predictions is None:
            max_predictions = math.ceil(MASK_RATE * seq_len)
        if not 1 <= max_predictions <= seq_len - 3:
            raise ValueError(
                f"max_predictions={max_predictions} must be from 1 to seq_len - 3 = {seq_len - 3}"
            )
        _check_enough(store, seq_len, int(store.num_tokens >= seq_len - 3))
        if store.num_documents < 2:
            raise ValueError(
                f"the {store.split} split has {store.num_documents} document: next-sentence pairs "
                "need at least two. Give more documents (a blank line or a record starts one), "
                "raise --valid-fraction if the held-out split is meant, or use objective clm"
            )
        self._store, self._seq_len, self._num_predictions = store, seq_len, max_predictions
        self._seed = seed
        self._budget = seq_len - 3
        self._bounds, self._first_chunk = chunk_documents(
            store.sentences, store.documents, self._budget
        )
        self.num_examples = len(self._bounds) - 1
        self._is_special = np.zeros(store.vocab_size, bool)
        self._is_special[list(store.specials.all)] = True
        self._ordinary = np.flatnonzero(~self._is_special).astype(np.int32)

    def batch(self, examples: np.ndarray, position: int) -> dict[str, np.ndarray]:
        rows, length, predictions = len(examples), self._seq_len, self._num_predictions
        bits = random_bits(self._seed, position, rows, 4 + length + 2 * predictions)
        nsp_labels = (bits[:, 0] >> 31).astype(np.int32)
        a, b = self._pairs(examples, nsp_labels == 1, bits[:, 1:4])
        ids, types, lengths = self._assemble(a, b)
        bits = bits[:, 4:]
        batch = self._mask(
            ids, bits[:, :length], bits[:, length:-predictions], bits[:, -predictions:]
        )
        return batch | {"token_type_ids": types, "lengths": lengths, "nsp_labels": nsp_labels}

    def _pairs(self, chunks, random_next, bits):
        """Token spans (start, stop) of A and of B, each (B,), together at most the budget."""
        a_start, border, b_stop = self._split(chunks, bits[:, 0])
        document = np.searchsorted(self._first_chunk, chunks, side="right") - 1
        first, last = self._first_chunk[document], self._first_chunk[document + 1]
        draw = (bits[:, 1].astype(np.uint64) << np.uint64(32)) | bits[:, 2]
        other = (draw % (self.num_examples - (last - first)).astype(np.uint64)).astype(np.int64)
        other += np.where(other >= first, last - first, 0)
        _, other_border, other_stop = self._split(other, bits[:, 0])
        b_start = np.where(random_next, other_border, border)
        b_stop = np.where(random_next, other_stop, b_stop)
        len_a, len_b, half = border - a_start, b_stop - b_start, self._budget // 2
        len_a = np.minimum(len_a, np.maximum(self._budget - len_b, self._budget - half))
        len_b = np.minimum(len_b, self._budget - len_a)
        return (border - len_a, border), (b_start, b_start + len_b)

    def _split(self, chunks, bits):
        """Start, border and stop of chunks in tokens; the border lies between two sentences."""
        first, last = self._bounds[chunks], self._bounds[chunks + 1]
        sentences = self._store.sentences
        start, stop = sentences[first], sentences[last]
        inner = np.maximum(last - first - 1, 1)
        border = sentences[first + 1 + _scale(bits, inner)]
        # A chunk of a single sentence has no border inside: split it between two tokens.
        within = start + 1 + _scale(bits, np.maximum(stop - start - 1, 1))
        return start, np.where(last - first > 1, border, within), stop

    def _assemble(self, a, b):
        specials = self._store.specials
        len_a, len_b = ((stop - start)[:, None] for start, stop in (a, b))
        column = np.arange(self._seq_len)[None, :]
        in_b = column > len_a + 1
        source = np.where(in_b, b[0][:, None] - len_a - 2, a[0][:, None] - 1) + column
        lengths = len_a + len_b + 3
        is_sep = (column == len_a + 1) | (column == lengths - 1)
        text = (column > 0) & (column < lengths) & ~is_sep
        ids = self._store.tokens[np.where(text, source, 0)].astype(np.int32)
        ids = np.where(text, ids, np.int32(specials.pad))
        ids[is_sep] = specials.sep
        ids[:, 0] = specials.cls
        types = (in_b & (column < lengths)).astype(np.int32)
        return ids, types, lengths[:, 0].astype(np.int32)

    def _mask(self, ids, score, action, replacement):
        rows, length = ids.shape
        rank = np.arange(self._num_predictions)[None, :]
        barred = np.uint32(0xFFFFFFFF)
        score = np.where(self._is_special[ids], barred, np.minimum(score, barred - np.uint32(1)))
        wanted = np.rint(MASK_RATE * (score < barred).sum(axis=1, keepdims=True))
        wanted = np.clip(wanted, 1, self._num_predictions)
        chosen = np.argpartition(score, self._num_predictions - 1, axis=1)
        chosen = chosen[:, : self._num_predictions]
        scores = np.take_along_axis(score, chosen, axis=1)
        order = np.argsort(scores, axis=1, kind="stable")
        chosen, scores = (np.take_along_axis(x, order, axis=1) for x in (chosen, scores))
        chosen = np.where((rank < wanted) & (scores < barred), chosen, length)
        chosen.sort(axis=1)
        real = chosen < length
        positions = np.where(real, chosen, 0)
        labels = np.take_along_axis(ids, positions, axis=1)

        tenths = _scale(action, 10)
        new = np.where(tenths < 8, np.int32(self._store.specials.mask), labels)
        random_tokens = self._ordinary[_scale(replacement, len(self._ordinary))]
        new = np.where(tenths == 8, random_tokens, new)
        padded = np.concatenate([ids, np.zeros((rows, 1), np.int32)], axis=1)
        np.put_along_axis(padded, chosen, new, axis=1)
        return {
            "input_ids": np.ascontiguousarray(padded[:, :length]),
            "mlm_positions": positions.astype(np.int32),
            "mlm_labels": np.where(real, labels, 0).astype(np.int32),
            "mlm_weights": real.astype(np.float32),
        }


def chunk_documents(
    sentences: np.ndarray, documents: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts every document greedily into runs of whole sentences of at most ``budget`` tokens.

    A sentence longer than the budget is a chunk of its own.

    Returns:
      bounds: (chunks + 1,) chunk c is sentences bounds[c]..bounds[c + 1].
      first_chunk: (documents + 1,) document d is chunks first_chunk[d]..first_chunk[d + 1].
    """
    edges = np.searchsorted(sentences, documents)
    current, stop = edges[:-1], edges[1:]
    counts = np.zeros(len(stop), np.int64)
    found, index = [], np.arange(len(stop))
    # All documents advance together by one chunk, so the loop is as long as the longest document.
    while len(current):
        found.append(current)
        counts[index] += 1
        reach = np.searchsorted(sentences, sentences[current] + budget, side="right") - 1
        current = np.minimum(np.maximum(reach, current + 1), stop)
        alive = current < stop
        current, stop, index = current[alive], stop[alive], index[alive]
    bounds = np.sort(np.concatenate([*found, edges[-1:]]))
    return bounds, np.concatenate([[0], np.cumsum(counts)])


def random_bits(seed: int, position: int, rows: int, width: int) -> np.ndarray:
    """(rows, width) uint32 random bits; row r depends on seed and position + r alone.

    Philox is counter-based: each place in the stream owns a range of counters, so any batch, cut
    in any way between processes, draws the same bits for the same place.
    """
    blocks = -(-width // 8)
    key = _philox_key(seed)
    raw = np.random.Philox(key=key, counter=position * blocks).random_raw(rows * blocks * 4)
    return raw.view(np.uint32).reshape(rows, blocks * 8)[:, :width]


@functools.lru_cache(maxsize=64)
def _philox_key(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)


def _scale(bits: np.ndarray, count) -> np.ndarray:
    """Maps uint32 bits to integers 0..count-1 (multiply and shift)."""
    product = bits.astype(np.uint64) * np.asarray(count, dtype=np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


def _check_enough(store: TokenStore, seq_len: int, examples: int) -> None:
    if examples < 1:
        raise ValueError(
            f"seq_len={seq_len} is too long for the {store.split} split, which has only "
            f"{store.num_tokens} tokens: give more text, a shorter --seq-len"
            + (", or a larger --valid-fraction" if store.split == "valid" else "")
        )
