"""The sparsity policy: which rule decides, what is left over, and its text forms."""

import pytest

from pallas_kernels import Pattern
from slope_jax.policy import SparsityPolicy


def paths(layers):
    inside = ("attention/qkv", "attention/output", "mlp/up", "mlp/down")
    return [f"layers/{i}/{p}" for i in range(layers) for p in inside] + ["pooler", "nsp"]


def test_first_match_wins():
    policy = SparsityPolicy(
        ((r"layers/1/mlp/up", "1:4"), (r"layers/\d+/mlp/.*", "2:8"), (r".*", "dense"))
    )
    table = policy.resolve(paths(2))
    assert table["layers/1/mlp/up"] == "1:4"
    assert {p for p, v in table.items() if v == "2:8"} == {
        "layers/0/mlp/up",
        "layers/0/mlp/down",
        "layers/1/mlp/down",
    }
    assert list(table) == paths(2)


def test_a_rule_matches_the_whole_path():
    """ "layers/1/.*" is not layer 11, and "nsp" is not a part of another name."""
    policy = SparsityPolicy(((r"layers/1/.*", "2:4"), (r".*", "dense")))
    table = policy.resolve(paths(12))
    assert [p for p, v in table.items() if v == "2:4"] == [
        p for p in paths(12) if p.startswith("layers/1/")
    ]
    with pytest.raises(ValueError, match="no sparsity rule matches nsp"):
        SparsityPolicy(((r"layers/.*|pooler|ns", "2:4"),)).resolve(paths(1))


def test_unmatched_linears_are_listed():
    policy = SparsityPolicy(((r"layers/.*", "2:4"),))
    with pytest.raises(ValueError, match="matches pooler, nsp; every linear"):
        policy.resolve(paths(2))


@pytest.mark.parametrize(
    "rules",
    [
        ((r"layers/0/atention/qkv", "dense"), (r".*", "2:4")),  # a typo
        ((r".*", "2:4"), (r"layers/0/attention/qkv", "dense")),  # shadowed
    ],
)
def test_a_rule_that_decides_nothing_is_an_error(rules):
    with pytest.raises(ValueError, match=r"decide no layer.*qkv"):
        SparsityPolicy(rules).resolve(paths(2))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ((r".*", "dense"), (r"layers/(", "2:4")),
            r"rule 1 \('layers/\(', '2:4'\) has a bad regex",
        ),
        (((r".*", "4:2"),), r"rule 0 \('\.\*', '4:2'\) has a bad pattern: pattern 4:2"),
        (((r".*", "sparse"),), r"rule 0 .* has a bad pattern: pattern 'sparse' is not"),
        ((r".*", "2:4"), "rule 0 '.*' is not a pair"),
        (((r".*",),), "is not a pair"),
        ((), "at least one"),
        ("2:4", "SparsityPolicy.parse reads text"),
    ],
)
def test_bad_rules_name_the_rule(rules, message):
    with pytest.raises(ValueError, match=message):
        SparsityPolicy(rules)


def test_dense_by_any_name():
    policy = SparsityPolicy((("pooler", "4:4"), (".*", Pattern(1, 2))))
    assert policy.resolve(paths(1))["pooler"] == "dense"
    assert policy.resolve(paths(1))["layers/0/mlp/up"] == "1:2"


def test_equal_policies_hash_alike():
    a, b = (SparsityPolicy.parse(" 2:4", num_layers=2) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a == SparsityPolicy.parse(Pattern(2, 4), num_layers=2)


def test_the_default_keeps_the_first_linear_and_the_heads_dense():
    table = SparsityPolicy.parse("2:4", num_layers=3).resolve(paths(3))
    dense = {p for p, v in table.items() if v == "dense"}
    assert dense == {"layers/0/attention/qkv", "pooler", "nsp"}
    assert set(table.values()) == {"dense", "2:4"}


def layer_patterns(policy, layers):
    table = policy.resolve(paths(layers))
    return [table[f"layers/{i}/mlp/up"] for i in range(layers)]


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("2:4,2:8", 4, ["2:4"] * 2 + ["2:8"] * 2),
        ("2:4, 2:8", 5, ["2:4"] * 3 + ["2:8"] * 2),  # layer 2 begins at 0.4 of the depth
        ("2:4,dense,1:4", 3, ["2:4", "dense", "1:4"]),
        (",".join(["2:4", "1:4"] * 5), 10, ["2:4", "1:4"] * 5),
        ("2:4,2:4", 2, ["2:4", "2:4"]),
    ],
)
def test_patterns_by_depth(text, layers, expected):
    policy = SparsityPolicy.parse(text, num_layers=layers)
    assert layer_patterns(policy, layers) == expected
    table = policy.resolve(paths(layers))
    assert table["layers/0/attention/qkv"] == table["pooler"] == "dense"


def test_by_depth_with_unequal_stretches():
    starts = {0.75: "1:4", 0.0: "2:4"}
    policy = SparsityPolicy.by_depth(starts, num_layers=12)
    assert layer_patterns(policy, 12) == ["2:4"] * 9 + ["1:4"] * 3
    assert SparsityPolicy.parse(starts, num_layers=12) == policy


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ({0.5: "2:4"}, "the first one 0"),
        ({0.0: "2:4", 1.0: "2:8"}, r"in \[0, 1\)"),
        ({}, "the first one 0"),
        ({0.0: "2:4", 0.9: "2:8"}, "no layer of 4 lies in the stretch that starts at 0.9"),
        ({0.0: "2:4", 0.5: "8:2"}, "pattern 8:2"),
    ],
)
def test_bad_depths(starts, message):
    with pytest.raises(ValueError, match=message):
        SparsityPolicy.by_depth(starts, num_layers=4)


@pytest.mark.parametrize("text", ["2:4", "dense", "2:4,2:8", "layers/(?=0).*=1:2; .*=dense"])
def test_text_round_trip(text):
    policy = SparsityPolicy.parse(text, num_layers=4)
    assert SparsityPolicy.parse(str(policy), num_layers=4) == policy
    assert SparsityPolicy.parse(policy, num_layers=4) is policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-4", "'2-4' is not of the form.*by depth"),
        ("", "is not a policy"),
        (None, "None is not a policy"),
        ("2:4,", "pattern ''"),
        ("2:4,2:4,2:4", "3 patterns for 2 layers"),
        (".*=2:4; pooler", "rule 'pooler' has no '='"),
        ("layers/[=2:4", r"rule 0 \('layers/\[', '2:4'\) has a bad regex"),
    ],
)
def test_bad_text_shows_the_forms(text, message):
    with pytest.raises(ValueError, match=message):
        SparsityPolicy.parse(text, num_layers=2)
