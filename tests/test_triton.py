"""The Triton kernel: its expansion and its obstacles on any machine, results on a GPU."""

import importlib.util
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Pattern, Query, choose, compress, decompress, nm_matmul
from pallas_kernels.triton import expand, matmul, support

obstacle = support.device_obstacle()
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# tokens, in, out: one row, whole and partial blocks in every direction, a split input axis
SHAPES = [
    (1, 8, 8),
    (5, 136, 72),
    (16, 768, 3072),
    (33, 1600, 4800),
    (64, 4096, 4096),
    (20, 4096, 4104),
    (1, 4096, 1032),
    (1000, 776, 1000),
]


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(obstacle is not None, reason=str(obstacle))(test))


def integers(seed, shape, dtype=jnp.bfloat16):
    return jax.random.randint(jax.random.key(seed), shape, -4, 5).astype(dtype)


def interpret(ptx, registers):
    """Runs the four instructions of the expansion, from their description in the PTX manual."""

    def lop3(a, b, c, table):
        index = (((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) for i in range(32))
        return sum((table >> j & 1) << i for i, j in enumerate(index))

    def prmt(a, b, selector):
        octets = (a | b << 32).to_bytes(8, "little")
        result = 0
        for i in range(4):
            pick = selector >> 4 * i & 15
            octet = octets[pick & 7]
            if pick & 8:
                octet = 0xFF * (octet >> 7)
            result |= octet << 8 * i
        return result

    operations = {
        "shl.b32": lambda a, n: a << n,
        "and.b32": lambda a, b: a & b,
        "lop3.b32": lop3,
        "prmt.b32": prmt,
    }
    for line in ptx.strip("{ }").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, operands = line.strip().split(" ", 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        numbers = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = operations[name](*numbers) & 0xFFFFFFFF


def test_expansion_puts_every_value_where_its_position_says():
    pairs = list(itertools.combinations(range(4), 2))
    values = [(0x1111, 0x2222, 0x3333, 0x4444), (0x8555, 0x9666, 0xA777, 0xFFFF)]
    for groups in itertools.product(pairs, repeat=4):
        lines = (groups[:2], groups[2:])
        octets = [a[0] | a[1] << 2 | b[0] << 4 | b[1] << 6 for a, b in lines]
        registers = {f"${8 + i}": values[0][i] | values[1][i] << 16 for i in range(4)}
        registers["$12"] = octets[0] | octets[1] << 16
        interpret(expand.expand_ptx(), registers)
        for half, line in enumerate(lines):
            dense = [0] * 8
            for group, positions in enumerate(line):
                for nth, position in enumerate(positions):
                    dense[4 * group + position] = values[half][2 * group + nth]
            assert [registers[f"${i}"] >> 16 * half & 0xFFFF for i in range(8)] == dense


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (("nm_matmul", (64, 64), "2:4", "float32"), "bfloat16 or float16, not float32"),
        (("nm_matmul", (64, 60), "2:4", "bfloat16"), "multiples of 8"),
        (("nm_matmul", (64, 64), "4:8", "bfloat16"), "not 4:8"),
        (("nm_sddmm", (64, 64), "2:4", "bfloat16"), "nm_sddmm"),
    ],
)
def test_obstacles_are_named(query, message):
    op, shape, pattern, dtype = query
    assert message in support.problem_obstacle(op, shape, Pattern.parse(pattern), dtype)
    assert support.problem_obstacle("nm_matmul", (64, 64), Pattern(2, 4), "float16") is None


class Device:
    platform = "gpu"
    device_kind = "a device"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "message"),
    [("7.5", "has 7.5"), ("gfx942", "NVIDIA"), ("8.0", "slope-jax[triton]"), ("12.0", "triton]")],
)
def test_device_obstacles_are_named(monkeypatch, capability, message):
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message in support.device_obstacle()


@pytest.mark.parametrize(
    ("capability", "tokens", "size", "chosen"),
    [
        ("8.0", 64, 4096, "triton"),
        ("8.9", 1, 4096, "triton"),
        ("8.6", 65, 4096, "xla"),
        ("8.0", 1, 768, "xla"),
        ("10.0", 1, 4096, "xla"),
    ],
)
def test_the_kernel_is_chosen_for_few_tokens_before_hopper(
    monkeypatch, capability, tokens, size, chosen
):
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def query(op):
        return Query(op, (size, size), Pattern(2, 4), "bfloat16", tokens=tokens)

    choice = choose(query("nm_matmul"))
    assert choice.implementation == chosen
    assert chosen == "xla" or "not measured on a device" in choice.reason
    assert choose(query("nm_sddmm")).implementation == "xla"


@pytest.mark.skipif(obstacle is None, reason="the kernel runs here")
def test_asking_for_the_kernel_on_the_wrong_machine_says_why():
    query = Query("nm_matmul", (64, 64), Pattern(2, 4), "bfloat16", tokens=8)
    with pytest.raises(NotImplementedError, match=r"'triton': .*8\.0"):
        choose(query, "triton")


def test_importing_the_package_imports_no_triton():
    code = "import sys, slope_jax, pallas_kernels; assert not {'triton', 'jax_triton'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 64, 65, 100_000])
@pytest.mark.parametrize(
    ("k", "f"), [(8, 8), (776, 1000), (4096, 4096), (4096, 128), (64, 100_000)]
)
@pytest.mark.parametrize("device", [matmul.Processors(), matmul.Processors(58, roomy=False)])
def test_every_split_has_steps(tokens, k, f, device):
    tile = matmul.choose_tile(tokens, k, f, device)
    splits = matmul.choose_splits(tile, tokens, k, f, device)
    steps = -(-k // (8 * tile.lines))
    assert 1 <= splits <= steps
    if splits > 1:
        programs = splits * -(-f // tile.outputs) * -(-tokens // tile.tokens)
        assert programs <= 1.5 * device.count


def test_bad_tiles_are_named():
    for options, message in [
        ({"tokens": 8}, "at least 16"),
        ({"outputs": 96}, "power of two"),
        ({"stages": 1}, "at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            matmul.Tile(**options)


@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("f", [1000, 30000])
def test_the_kernel_compiles_and_fits_without_a_gpu(capability, tokens, f):
    """Every tile in use, in the 99 KiB of shared memory of the smallest of these devices."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.triton import kernel

    tile = matmul.choose_tile(tokens, 776, f, matmul.Processors())
    constants = matmul.constants(tile, tokens, 776, f, steps=4)
    types = ("*bf16", "*bf16", "*u8", "*fp32")
    names = kernel.nm_matmul.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(
        kernel.nm_matmul,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= 99 * 1024
    # The weight goes from shared memory to the tensor core through registers alone.
    body = compiled.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert body.count("elementwise_inline_asm") == 1
    if capability < 90:
        assert "convert_layout" not in body
        assert "local_alloc" not in body


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_is_exact_on_integers_and_repeats_itself(shape, dtype):
    tokens, k, f = shape
    x, w = integers(0, (tokens, k), dtype), compress(integers(1, (k, f), dtype), "2:4")
    y = nm_matmul(x, w, out_dtype=jnp.float32, implementation="triton")
    exact = np.asarray(x, np.float64) @ np.asarray(decompress(w), np.float64)
    np.testing.assert_array_equal(y, exact)
    for _ in range(5):
        again = nm_matmul(x, w, out_dtype=jnp.float32, implementation="triton")
        np.testing.assert_array_equal(y, again)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_is_within_twice_the_error_of_the_dense_product(shape, dtype):
    tokens, k, f = shape
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (tokens, k)).astype(dtype)
    w = compress(jax.random.normal(keys[1], (k, f)).astype(dtype), "2:4")
    exact = np.asarray(x, np.float64) @ np.asarray(decompress(w), np.float64)
    dense = np.abs(np.asarray(x @ decompress(w), np.float64) - exact).max()
    y = nm_matmul(x, w, implementation="triton")
    assert y.dtype == dtype
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * dense


@needs_gpu
def test_a_stack_of_products_is_a_loop_over_them():
    x, w = integers(0, (3, 2, 4, 64)), compress(integers(1, (3, 64, 48)), "2:4")
    y = jax.jit(jax.vmap(lambda x, w: nm_matmul(x, w, implementation="triton")))(x, w)
    exact = np.asarray(x, np.float32).reshape(3, 8, 64) @ np.asarray(decompress(w), np.float32)
    exact = exact.reshape(3, 2, 4, 48).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), exact.astype(np.float32))


@needs_gpu
def test_nan_reaches_the_outputs_that_it_belongs_to():
    x = integers(0, (20, 64)).at[7, 3].set(jnp.nan)
    w = compress(integers(1, (64, 72)), "2:4")
    y = np.asarray(nm_matmul(x, w, implementation="triton"), np.float32)
    assert np.isnan(y[7]).all()  # a pruned entry is a zero, and 0 x NaN is NaN, as in XLA
    assert np.isfinite(np.delete(y, 7, axis=0)).all()
