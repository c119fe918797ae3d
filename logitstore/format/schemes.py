"""Truncation schemes: which entries of a distribution a row keeps, and the options that choose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

SchemeName = Literal["topk", "nucleus", "sample", "hybrid"]
MAX_DRAWS = 2**12

OPTIONS: dict[str, dict[str, int | float]] = {
    "topk": {"k": 64},
    "nucleus": {"k": 64, "mass": 0.98, "k_min": 4},
    "sample": {"num_draws": 50, "seed": 0},
    "hybrid": {"num_draws": 50, "seed": 0},
}
"""Options of each scheme, and what they are if they are not given."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Which entries of a distribution a row keeps.

    `topk` and `nucleus` truncate: what they leave out is the tail. `sample` (RS-KD, arXiv 2503.16870) and `hybrid`
    draw: the draws stand for the whole distribution, and their weights are unbiased estimates of it.
    """

    name: SchemeName = "topk"
    """topk: the k likeliest. nucleus: the smallest set that reaches `mass`, between k_min and k entries. sample: the
    distinct ids of num_draws independent draws. hybrid: all entries above some 1 / num_draws, which each stand for
    themselves, and systematic draws from the others, which each stand for that much."""
    k: int = 64
    """Most entries kept at a row that is truncated; 0 where entries are drawn."""
    mass: float = 1.0
    """Probability that a nucleus must reach; 1 for the others."""
    k_min: int = 1
    """Fewest entries of a nucleus; 1 for the others."""
    num_draws: int = 0
    """Draws from the whole distribution, some of which hybrid replaces by what they would have drawn; 0 for topk and
    nucleus."""
    seed: int = 0
    """Of the draws: the same shard of the same target has the same ones, whoever computes it."""

    def __post_init__(self) -> None:
        if self.name not in get_args(SchemeName):
            raise ValueError(f"scheme must be topk, nucleus, sample or hybrid, got scheme={self.name}")
        if not 0.0 < self.mass <= 1.0:
            raise ValueError(f"mass must be above 0 and at most 1, got mass={self.mass}; 0.98 is usual")
        if self.draws:
            if not 2 <= self.num_draws <= MAX_DRAWS:
                raise ValueError(
                    f"num_draws must be between 2 and {MAX_DRAWS}, got num_draws={self.num_draws}; 50 is usual"
                )
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed must be between 0 and 2**63 - 1, got seed={self.seed}; 0 will do")
        elif (self.num_draws, self.seed) != (0, 0):
            raise ValueError(
                f"num_draws and seed must be 0 with scheme={self.name}, got num_draws={self.num_draws}, "
                f"seed={self.seed}; sample and hybrid draw"
            )
        if self.name != "nucleus" and (self.mass, self.k_min) != (1.0, 1):
            raise ValueError(
                f"mass and k_min must be 1 with scheme={self.name}, got mass={self.mass}, k_min={self.k_min}"
            )
        if self.draws and self.k != 0:
            raise ValueError(f"k must be 0 with scheme={self.name}, got k={self.k}; num_draws says how many are kept")
        if not self.draws and not 1 <= self.k <= 65535:
            raise ValueError(f"k must be between 1 and 65535, got k={self.k}; 64 is usual")
        if self.name == "nucleus" and not 1 <= self.k_min <= self.k:
            raise ValueError(f"k_min must be between 1 and k={self.k}, got k_min={self.k_min}")

    @property
    def draws(self) -> bool:
        """Whether entries are drawn, and stand for all others too."""
        return self.name in ("sample", "hybrid")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if k is more than there are tokens."""
        if self.k > vocab_size:
            raise ValueError(f"k must be at most the vocabulary size {vocab_size}, got k={self.k}; give a smaller --k")


def make_scheme(name: str, given: Mapping[str, int | float | None]) -> Scheme:
    """Makes a scheme from options as a command has them.

    Args:
        name: Which.
        given: Options by name; None where one was not given.

    Raises:
        ValueError: Another scheme's option was given, or a value is out of range.
    """
    if name not in OPTIONS:
        raise ValueError(f"scheme must be one of {list(OPTIONS)}, got scheme={name}")
    for option, value in given.items():
        if value is not None and option not in OPTIONS[name]:
            takes = " or ".join(f"--scheme {other}" for other, options in OPTIONS.items() if option in options)
            raise ValueError(f"{option} must be left out with --scheme {name}, got {option}={value}; {takes} takes it")
    chosen: dict[str, Any] = {"name": name, "k": 0} | OPTIONS[name]
    chosen |= {option: value for option, value in given.items() if value is not None}
    if name == "nucleus" and given.get("k_min") is None:
        chosen["k_min"] = min(chosen["k_min"], chosen["k"])
    return Scheme(**chosen)


def flags(scheme: Scheme) -> list[str]:
    """Returns the command line options that make a scheme."""
    return ["--scheme", scheme.name, *(part for name in OPTIONS[scheme.name] for part in _flag(scheme, name))]


def _flag(scheme: Scheme, name: str) -> tuple[str, str]:
    return f"--{name}", repr(getattr(scheme, name))


def describe(scheme: Scheme) -> str:
    """Returns a scheme and its options in one line for people."""
    values = {name: getattr(scheme, name) for name in OPTIONS[scheme.name]}
    # all digits of a seed
    options = [f"{name} {value:{'g' if isinstance(value, float) else 'd'}}" for name, value in values.items()]
    return ", ".join([scheme.name, *options])


def smaller(stored: Scheme, *, k: int | None, mass: float | None) -> Scheme:
    """Returns the scheme that keeps fewer entries than a stored one, as `--k` and `--mass` ask for it.

    Args:
        stored: The scheme of the store.
        k: Greatest number of entries of a row; None for the stored one.
        mass: Probability mass of a nucleus, as which `topk` rows can be read too; None for the stored one.

    Raises:
        ValueError: A value is out of range, or the stored entries were drawn.
    """
    if stored.draws:
        check_smaller(stored, stored)  # raises, with the reason
    most = stored.k if k is None else k
    if mass is None and stored.name == "topk":
        return Scheme(k=most)
    k_min = stored.k_min if stored.name == "nucleus" else int(OPTIONS["nucleus"]["k_min"])
    wanted = stored.mass if mass is None else mass
    return Scheme(name="nucleus", k=most, mass=wanted, k_min=max(1, min(k_min, most)))


def check_smaller(stored: Scheme, scheme: Scheme) -> None:
    """Checks that rows of one scheme hold all that another keeps, whatever the distribution.

    Raises:
        ValueError: They do not.
    """
    whole = "leave scheme (--k and --mass) out to read the store as it is"
    if stored.draws or scheme.draws:
        which, one = ("stored rows", stored) if stored.draws else ("scheme", scheme)
        raise ValueError(
            f"{which} must be of topk or nucleus to be truncated further, got {describe(one)}: a token that was not "
            f"drawn may be likelier than one that was; {whole}"
        )
    if scheme.k > stored.k:
        raise ValueError(f"k must be at most {stored.k}, which the store keeps, got k={scheme.k}; {whole}")
    if stored.name == "topk":
        return
    if scheme.name == "topk":
        if scheme.k > stored.k_min:
            raise ValueError(
                f"k must be at most {stored.k_min}, the k_min of the stored nucleus, got topk with k={scheme.k}: rows "
                "that reach the mass sooner hold no more; give a nucleus of lower mass instead"
            )
        return
    for name in ("mass", "k_min"):
        if getattr(scheme, name) > getattr(stored, name):
            raise ValueError(
                f"{name} must be at most {getattr(stored, name):g} as in the stored nucleus, got "
                f"{name}={getattr(scheme, name):g}; {whole}"
            )
