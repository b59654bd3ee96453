"""What one thread of `nm_transpose` does between its loads and its stores, for pattern 2:4.

A block is 8 inputs x 8 outputs. All is arithmetic on 32-bit words, without a branch, so that the
same functions run on MLIR values in the kernel and on uint32 arrays in a test. A word holds one
float32, or two 16-bit floats in its halves, which are compared and selected side by side. A mask is
all ones in the lanes (halves, or the whole word) where it holds.

`machine` has what Python's operators lack:

* permute(low, high, selector): four of the eight bytes of high:low, as PTX's `prmt.b32`: nibble i
  of the selector names byte i; with 8 added, it stands for eight copies of the byte's first bit.
* magnitude(word, dtype): lanes that order as unsigned integers as |word| does, their first bit 0,
  all NaN equal and above Inf.
* widen(word, half, dtype): the float32 of a 16-bit float in half 0 or 1.
* pack(low, high, dtype): two float32 rounded to nearest even, in the halves of a word.
"""

HALVES = {"float32": 1, "bfloat16": 2, "float16": 2}
SIZE = 8  # of a block, both ways


def transpose_block(machine, values, metadata, source: str, target: str):
    """The double-pruned transpose of a block.

    Args:
      machine: see above.
      values: 4 rows, in order of the inputs, each 8 (float32) or 4 words along the outputs.
      metadata: 2 words, the bytes of the outputs in order.
      source, target: dtypes of the values.

    Returns:
      values: 4 rows, in order of the outputs, each 8 or 4 words along the inputs.
      metadata: 2 words, the bytes of the inputs in order.
    """
    lanes = HALVES[source]
    members = _members(machine, values, lanes)
    kept_bits = _kept_bits(machine, metadata, lanes)
    dense = [[None] * SIZE for _ in range(SIZE // lanes)]
    for member, line in enumerate(dense):
        for group in range(2):
            first, second = (row[member] for row in members[2 * group : 2 * group + 2])
            bits = kept_bits[member][4 * group : 4 * group + 4]
            line[4 * group : 4 * group + 4] = _expand(first, second, bits)
    # slots[s][g][i]: survivor s of the outputs' group g for input i; with two lanes, g is the lane.
    slots = [[[] for _ in range(2 // lanes)] for _ in range(2)]
    nibbles = [[] for _ in range(2 // lanes)]
    for group in range(2 // lanes):
        for i in range(SIZE):
            four = [line[i] for line in dense[4 * group : 4 * group + 4]]
            first, second, nibble = _select(machine, four, source)
            slots[0][group].append(first)
            slots[1][group].append(second)
            nibbles[group].append(nibble)
    rows = [_row(machine, slots[s], g, source, target) for g in range(2) for s in range(2)]
    return rows, _join_nibbles(machine, nibbles, lanes)


def _members(machine, values, lanes: int):
    """Rows of words; with two lanes, word j holds the outputs j and j + 4, one of each group."""
    if lanes == 1:
        return values
    return [
        [
            machine.permute(row[j // 2], row[2 + j // 2], 0x7632 if j % 2 else 0x5410)
            for j in range(4)
        ]
        for row in values
    ]


def _kept_bits(machine, metadata, lanes: int):
    """masks[member][b]: where bit b of the metadata byte is set."""
    masks = [[] for _ in range(SIZE // lanes)]
    for bit in range(8):
        first, second = (word << (7 - bit) if bit < 7 else word for word in metadata)
        for member, of_member in enumerate(masks):
            if lanes == 1:
                word, selector = (first, second)[member // 4], 0x1111 * (8 + member % 4)
            else:
                word, selector = first, 0x1111 * (8 + member) + 0x4400
            of_member.append(machine.permute(word, second, selector))
    return masks


def _expand(first, second, bits):
    """Four dense entries from two survivors at the positions 2 * bits[1] + bits[0], and so on."""
    low0, high0, low1, high1 = bits  # the first position is 0, 1 or 2, the second 1, 2 or 3
    return [
        first & ~(low0 | high0),
        (first & low0) | (second & ~high1),
        (first & high0) | (second & ~low1),
        second & low1 & high1,
    ]


def _select(machine, four, dtype: str):
    """The two of largest magnitude, in order, and their positions' nibble, repeated in each lane."""
    lanes = HALVES[dtype]
    keys = [machine.magnitude(word, dtype) for word in four]
    beats = {(j, i): _larger(keys[j], keys[i], lanes) for j in range(4) for i in range(j)}
    signs = [
        ~_two_of(beats[1, 0], beats[2, 0], beats[3, 0]),
        ~_two_of(~beats[1, 0], beats[2, 1], beats[3, 1]),
        ~_two_of(~beats[2, 0], ~beats[2, 1], beats[3, 2]),
        _two_of(beats[3, 0], beats[3, 1], beats[3, 2]),
    ]
    # Copies of each lane's first bit, over the lane.
    spread = 0xBBBB if lanes == 1 else 0xBB99
    kept = [machine.permute(sign, sign, spread) for sign in signs]
    first = _choose(kept[0], four[0], _choose(kept[1], four[1], four[2]))
    second = _choose(kept[3], four[3], _choose(kept[2], four[2], four[1]))
    low = ~kept[0] & (kept[1] ^ 0xAAAAAAAA)  # bit 0: position 1, bit 1: position 2
    high = kept[3] | (kept[2] ^ 0x55555555)  # bit 2: position 1 or 3, bit 3: position 2 or 3
    return first, second, (low & 0x33333333) | (high & 0xCCCCCCCC)


def _larger(key, other, lanes: int):
    """The first bit of a lane is set where key > other. No half borrows from its neighbour."""
    return other - key if lanes == 1 else key - other + 0x7FFF7FFF


def _two_of(a, b, c):
    return (a & b) | (c & (a | b))


def _choose(mask, yes, no):
    return (mask & yes) | (~mask & no)


def _row(machine, slot, group: int, source: str, target: str):
    """The words of a row of the result: eight inputs in `target`, from words in `source`."""
    if HALVES[source] == 1:
        if target == source:
            return slot[group]
        low, high = slot[group][::2], slot[group][1::2]
        return [machine.pack(a, b, target) for a, b in zip(low, high, strict=True)]
    if target == source:
        selector = 0x7632 if group else 0x5410
        low, high = slot[0][::2], slot[0][1::2]
        return [machine.permute(a, b, selector) for a, b in zip(low, high, strict=True)]
    floats = [machine.widen(word, group, source) for word in slot[0]]
    return _row(machine, [floats], 0, "float32", target)


def _join_nibbles(machine, nibbles, lanes: int):
    """Two words of metadata: a byte is an input, its low nibble the first group of outputs."""
    words = []
    for first in (0, 4):
        if lanes == 1:
            low, high = (_four_bytes(machine, line[first : first + 4]) for line in nibbles)
        else:
            a, b, c, d = nibbles[0][first : first + 4]
            ab, cd = machine.permute(a, b, 0x6240), machine.permute(c, d, 0x6240)
            low, high = machine.permute(ab, cd, 0x5410), machine.permute(ab, cd, 0x7632)
        words.append((low & 0x0F0F0F0F) | (high & 0xF0F0F0F0))
    return words


def _four_bytes(machine, words):
    """One byte of each of four words."""
    a, b, c, d = words
    return machine.permute(machine.permute(a, b, 0x40), machine.permute(c, d, 0x40), 0x5410)
