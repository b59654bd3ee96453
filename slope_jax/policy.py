"""Which linear layer keeps which N:M pattern: ordered regex rules over logical module paths."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from pallas_kernels import Pattern

DENSE = "dense"
FIRST_LINEAR = "layers/0/attention/qkv"
_FORMS = (
    "Write a pattern ('2:4'), 'dense', patterns by depth ('2:4,2:8': first half, second half), or"
    " rules ('layers/0/.*=dense; .*=2:4')"
)


@dataclasses.dataclass(frozen=True)
class SparsityPolicy:
    r"""Ordered rules, path regex -> pattern; the first rule that matches a path decides.

    A rule matches when its regex matches the *whole* logical path (`re.fullmatch`), so "pooler"
    is that layer alone and "layers/1/.*" never means layer 12. Paths read like
    "layers/3/attention/qkv", "layers/3/mlp/down", "pooler", "mlm/transform", "lm_head". Nothing is
    decided silently: `resolve` fails on a path without a rule and on a rule without a path.

    >>> policy = SparsityPolicy(((r"layers/0/attention/qkv", "dense"), (r"layers/\d+/.*", "2:4")))
    >>> policy.resolve(["layers/0/attention/qkv", "layers/0/mlp/up"])
    {'layers/0/attention/qkv': 'dense', 'layers/0/mlp/up': '2:4'}

    Attributes:
      rules: pairs (regex, pattern), a pattern being "n:m" or "dense". "4:4" means dense.

    Raises:
      ValueError: no rules, or a rule with a bad regex or pattern; the message names the rule.
    """

    rules: tuple[tuple[str, str], ...]

    def __post_init__(self):
        if isinstance(self.rules, str) or not self.rules:
            raise ValueError(
                f"rules={self.rules!r}: a policy is a sequence of (regex, pattern) pairs, at least"
                " one; SparsityPolicy.parse reads text"
            )
        rules = tuple(_checked_rule(i, rule) for i, rule in enumerate(self.rules))
        object.__setattr__(self, "rules", rules)

    def __str__(self) -> str:
        """The rules as text that `parse` reads back."""
        return "; ".join(f"{regex}={pattern}" for regex, pattern in self.rules)

    def resolve(self, paths: Iterable[str]) -> dict[str, str]:
        """The table path -> "n:m" or "dense", in the order of `paths`.

        Raises:
          ValueError: paths that no rule matches, or rules that decide no path; all are listed.
        """
        table, unmatched, used = {}, [], set()
        for path in paths:
            for i, (regex, pattern) in enumerate(self.rules):
                if re.fullmatch(regex, path):
                    table[path] = pattern
                    used.add(i)
                    break
            else:
                unmatched.append(path)
        if unmatched:
            raise ValueError(
                f"no sparsity rule matches {_listed(unmatched)}; every linear layer needs one:"
                " add rules, or end with ('.*', 'dense'). The whole path must match."
            )
        unused = [f"{rule!r}" for i, rule in enumerate(self.rules) if i not in used]
        if unused:
            raise ValueError(
                f"sparsity rules that decide no layer: {_listed(unused)}; the regex has a typo, an"
                f" earlier rule takes its layers, or the model has none. Paths: {_listed(table)}"
            )
        return table

    @classmethod
    def uniform(cls, pattern: "str | Pattern") -> "SparsityPolicy":
        """The method's default: one pattern for attention and MLP linears, the rest dense.

        Dense stay the first linear after the input and everything outside the layers (heads and
        pooler), as in SLoPe, section 3.
        """
        pattern = _checked_pattern(pattern)
        if pattern == DENSE:
            return cls(((".*", DENSE),))
        return cls(((FIRST_LINEAR, DENSE), (r"layers/\d+/.*", pattern), *_OUTSIDE_LAYERS))

    @classmethod
    def by_depth(
        cls, patterns: Mapping[float, "str | Pattern"], *, num_layers: int
    ) -> "SparsityPolicy":
        """Patterns that change with depth; the first linear and the heads stay dense.

        >>> policy = SparsityPolicy.by_depth({0.0: "2:4", 0.5: "2:8"}, num_layers=4)
        >>> policy.resolve(["layers/0/attention/qkv", "layers/1/mlp/up", "layers/2/mlp/up", "nsp"])
        {'layers/0/attention/qkv': 'dense', 'layers/1/mlp/up': '2:4', 'layers/2/mlp/up': '2:8', 'nsp': 'dense'}

        Args:
          patterns: start, as a fraction of the depth in [0, 1) -> pattern. Layer i takes the
            pattern of the last start <= i / num_layers; the first start is 0.
          num_layers: layers of the model.

        Raises:
          ValueError: starts outside [0, 1), none at 0, or a stretch that contains no layer.
        """
        starts = sorted(patterns)
        if not starts or starts[0] != 0 or starts[-1] >= 1:
            raise ValueError(
                f"by_depth starts {starts} are fractions of the depth in [0, 1), the first one 0;"
                " for example {0.0: '2:4', 0.5: '2:8'}"
            )
        stretches = {start: [] for start in starts}
        for layer in range(num_layers):
            # Compared as products with a tolerance: 0.1 * 10 layers is layer 1, whatever rounding.
            start = max(s for s in starts if s * num_layers <= layer + 1e-6)
            stretches[start].append(str(layer))
        empty = [start for start, layers in stretches.items() if not layers]
        if empty:
            raise ValueError(
                f"by_depth: no layer of {num_layers} lies in the stretch that starts at"
                f" {_listed(map(str, empty))}; use fewer patterns or more layers"
            )
        depth = [(f"layers/({'|'.join(stretches[s])})/.*", patterns[s]) for s in starts]
        return cls(((FIRST_LINEAR, DENSE), *depth, *_OUTSIDE_LAYERS))

    @classmethod
    def parse(
        cls, text: "str | Pattern | Mapping | SparsityPolicy", *, num_layers: int
    ) -> "SparsityPolicy":
        """The policy that `text` describes; a policy is returned as it is, a mapping is `by_depth`.

        * "2:4" (or a `Pattern`): `uniform`. "dense": nothing is pruned.
        * "2:4,2:8": `by_depth` with equal stretches, here the first and the second half.
        * "layers/0/.*=dense; .*=2:4": rules in order, split at ";" and at the last "=".

        Raises:
          ValueError: none of these forms; the message shows them.
        """
        if isinstance(text, SparsityPolicy):
            return text
        if isinstance(text, Pattern):
            return cls.uniform(text)
        if isinstance(text, Mapping):
            return cls.by_depth(text, num_layers=num_layers)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"sparsity={text!r} is not a policy. {_FORMS}.")
        if "=" in text:
            return cls(tuple(_rule_from_text(part) for part in text.split(";") if part.strip()))
        parts = [part.strip() for part in text.split(",")]
        if len(parts) == 1:
            return cls.uniform(parts[0])
        if len(parts) > num_layers:
            raise ValueError(
                f"sparsity={text!r} names {len(parts)} patterns for {num_layers} layers; use at"
                " most one a layer"
            )
        return cls.by_depth(
            {i / len(parts): part for i, part in enumerate(parts)}, num_layers=num_layers
        )


_OUTSIDE_LAYERS = ((r"(?!layers/).*", DENSE),)


def _checked_pattern(pattern: "str | Pattern") -> str:
    if pattern == DENSE:
        return DENSE
    try:
        parsed = Pattern.parse(pattern)
    except ValueError as error:
        raise ValueError(f"{error}. {_FORMS}.") from None
    return DENSE if parsed.is_dense else str(parsed)


def _checked_rule(index: int, rule: Sequence[str]) -> tuple[str, str]:
    name = f"sparsity rule {index} {rule!r}"
    if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
        raise ValueError(f"{name} is not a pair (regex, pattern); for example ('.*', 'dense')")
    try:
        re.compile(rule[0])
    except re.error as error:
        raise ValueError(f"{name} has a bad regex: {error}") from None
    try:
        return rule[0], _checked_pattern(rule[1])
    except ValueError as error:
        raise ValueError(f"{name} has a bad pattern: {error}") from None


def _rule_from_text(text: str) -> tuple[str, str]:
    regex, equals, pattern = text.rpartition("=")
    if not equals:
        raise ValueError(f"sparsity rule {text.strip()!r} has no '='. {_FORMS}.")
    return regex.strip(), pattern.strip()


def _listed(items: Iterable[str], limit: int = 8) -> str:
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
