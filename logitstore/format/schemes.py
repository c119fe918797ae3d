"""Schemes: the rules that select the entries of a row, and their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

SchemeName = Literal["topk", "nucleus", "sample", "hybrid"]
MAX_DRAWS = 2**12
"""Maximum value of `num_draws`."""

OPTIONS: dict[str, dict[str, int | float]] = {
    "topk": {"k": 64},
    "nucleus": {"k": 64, "mass": 0.98, "k_min": 4},
    "sample": {"num_draws": 50, "seed": 0},
    "hybrid": {"num_draws": 50, "seed": 0},
}
"""Options of each scheme and their default values."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Rule that selects the entries of a row from the target's distribution.

    `topk` and `nucleus` truncate: the tokens that are not kept form the tail. `sample` (RS-KD, arXiv 2503.16870) and
    `hybrid` draw entries at random: the weights of the entries are an unbiased estimate of the whole distribution.
    docs/format.md, "Which entries a row keeps", defines each scheme.
    """

    name: SchemeName = "topk"
    """Name of the scheme.

    - topk: the k likeliest tokens.
    - nucleus: the smallest set of likeliest tokens whose probabilities sum to at least `mass`, but at least k_min and
      at most k tokens.
    - sample: the distinct tokens of num_draws independent draws.
    - hybrid: all tokens with a probability of about 1 / num_draws or more, each weighted by its probability. The other
      tokens are laid end to end on a line in the order of their ids. The length of a token on the line is its
      probability. One token is drawn per step of about 1 / num_draws along the line. The weight of a drawn token is
      the length of the step.
    """
    k: int = 64
    """Maximum number of entries that topk and nucleus keep at a row, 1 to 65535; 0 for sample and hybrid."""
    mass: float = 1.0
    """Total probability that the entries of a nucleus must reach, above 0 and at most 1; 1 for the other schemes."""
    k_min: int = 1
    """Minimum number of entries of a nucleus, 1 to k; 1 for the other schemes."""
    num_draws: int = 0
    """Number of draws at each row, 2 to 4096; 0 for topk and nucleus. hybrid usually makes fewer draws, because it
    keeps the likeliest tokens without drawing them."""
    seed: int = 0
    """Seed of the draws, 0 to 2**63 - 1; 0 for topk and nucleus. The random numbers of a shard depend only on the seed
    and the shard's number, so it does not matter which worker computes the shard."""

    def __post_init__(self) -> None:
        if self.name not in get_args(SchemeName):
            raise ValueError(f"scheme must be topk, nucleus, sample or hybrid, got scheme={self.name}")
        if not 0.0 < self.mass <= 1.0:
            raise ValueError(f"mass must be above 0 and at most 1, got mass={self.mass}; 0.98 is usual")
        # Fields that a scheme does not use have fixed values. With other values, `check_same` would refuse a spec that
        # describes the same content.
        if self.draws:
            if not 2 <= self.num_draws <= MAX_DRAWS:
                raise ValueError(
                    f"num_draws must be between 2 and {MAX_DRAWS}, got num_draws={self.num_draws}; 50 is usual"
                )
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed must be between 0 and 2**63 - 1, got seed={self.seed}; 0 is usual")
        elif (self.num_draws, self.seed) != (0, 0):
            raise ValueError(
                f"num_draws and seed must be 0 with scheme={self.name}, got num_draws={self.num_draws}, "
                f"seed={self.seed}; only sample and hybrid use them"
            )
        if self.name != "nucleus" and (self.mass, self.k_min) != (1.0, 1):
            raise ValueError(
                f"mass and k_min must be 1 with scheme={self.name}, got mass={self.mass}, k_min={self.k_min}"
            )
        if self.draws and self.k != 0:
            raise ValueError(f"k must be 0 with scheme={self.name}, got k={self.k}; give num_draws instead")
        if not self.draws and not 1 <= self.k <= 65535:
            raise ValueError(f"k must be between 1 and 65535, got k={self.k}; 64 is usual")
        if self.name == "nucleus" and not 1 <= self.k_min <= self.k:
            raise ValueError(f"k_min must be between 1 and k={self.k}, got k_min={self.k_min}")

    @property
    def draws(self) -> bool:
        """Whether the scheme draws entries at random and gives each entry a weight: True for sample and hybrid."""
        return self.name in ("sample", "hybrid")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks that k does not exceed the number of tokens in the vocabulary.

        Raises:
            ValueError: k exceeds `vocab_size`.
        """
        if self.k > vocab_size:
            raise ValueError(f"k must be at most the vocabulary size {vocab_size}, got k={self.k}; give a smaller --k")


def make_scheme(name: str, given: Mapping[str, int | float | None]) -> Scheme:
    """Makes a scheme from the options of a command line.

    Args:
        name: Name of the scheme.
        given: Values by option name. None stands for an option that was not given; `OPTIONS` has the default.

    Raises:
        ValueError: The scheme is unknown, an option does not belong to the scheme, or a value is out of range.
    """
    if name not in OPTIONS:
        raise ValueError(f"scheme must be one of {list(OPTIONS)}, got scheme={name}")
    for option, value in given.items():
        if value is not None and option not in OPTIONS[name]:
            takes = " or ".join(f"--scheme {other}" for other, options in OPTIONS.items() if option in options)
            raise ValueError(
                f"{option} needs {takes}, got {option}={value} with --scheme {name}; omit --{option}, or give "
                "another --scheme"
            )
    chosen: dict[str, Any] = {"name": name, "k": 0} | OPTIONS[name]
    chosen |= {option: value for option, value in given.items() if value is not None}
    # The given k may be smaller than the default k_min, which must not exceed k.
    if name == "nucleus" and given.get("k_min") is None:
        chosen["k_min"] = min(chosen["k_min"], chosen["k"])
    return Scheme(**chosen)


def describe(scheme: Scheme) -> str:
    """Returns the name and options of a scheme as one line of text, such as `topk, k 64`."""
    values = {name: getattr(scheme, name) for name in OPTIONS[scheme.name]}
    # Only floats get the format "g". This format would round a large integer, such as a seed, to six digits.
    options = [f"{name} {value:{'g' if isinstance(value, float) else 'd'}}" for name, value in values.items()]
    return ", ".join([scheme.name, *options])


def smaller(stored: Scheme, *, k: int | None, mass: float | None) -> Scheme:
    """Returns the smaller scheme that the options `--k` and `--mass` describe.

    This function does not check that the stored rows hold every entry that the returned scheme keeps. `check_smaller`
    checks that.

    Args:
        stored: Scheme of the store.
        k: Maximum number of entries of a row; None keeps the `k` of the store.
        mass: Total probability that a nucleus must reach; None keeps the `mass` of the store. If `mass` is given for a
            `topk` store, the result is a nucleus.

    Raises:
        ValueError: A value is out of range, or the scheme of the store draws entries at random.
    """
    if stored.draws:
        check_smaller(stored, stored)  # Always raises here: drawn rows cannot be truncated further.
    most = stored.k if k is None else k
    if mass is None and stored.name == "topk":
        return Scheme(k=most)
    # A topk store has no k_min of its own, so the default is used, limited to the new k.
    k_min = stored.k_min if stored.name == "nucleus" else int(OPTIONS["nucleus"]["k_min"])
    wanted = stored.mass if mass is None else mass
    return Scheme(name="nucleus", k=most, mass=wanted, k_min=max(1, min(k_min, most)))


def check_smaller(stored: Scheme, scheme: Scheme) -> None:
    """Checks that rows stored with one scheme hold every entry that another scheme would keep.

    Args:
        stored: Scheme of the stored rows.
        scheme: Scheme with which the rows are to be read.

    Raises:
        ValueError: `scheme` may keep an entry that is not among the stored entries.
    """
    whole = "omit scheme (--k and --mass) to read the store as it is"
    if stored.draws or scheme.draws:
        which, one = ("stored rows", stored) if stored.draws else ("scheme", scheme)
        raise ValueError(
            f"{which} must be topk or nucleus to read fewer entries of each row, got {describe(one)} (a token that "
            f"was not drawn may be likelier than one that was); {whole}"
        )
    if scheme.k > stored.k:
        raise ValueError(f"k must be at most {stored.k}, which the store keeps, got k={scheme.k}; {whole}")
    if stored.name == "topk":
        return  # The k likeliest tokens include every nucleus of at most k tokens.
    if scheme.name == "topk":
        # Every row of a nucleus holds at least its k_min likeliest tokens, and some rows hold only these.
        if scheme.k > stored.k_min:
            raise ValueError(
                f"k must be at most {stored.k_min}, the k_min of the stored nucleus, got topk with k={scheme.k} (some "
                "rows hold no more than k_min entries); give a smaller k, or a nucleus of lower mass"
            )
        return
    # If neither mass nor k_min exceeds its stored value, the new nucleus is part of the stored nucleus at every row.
    for name in ("mass", "k_min"):
        if getattr(scheme, name) > getattr(stored, name):
            raise ValueError(
                f"{name} must be at most {getattr(stored, name):g}, the {name} of the stored nucleus, "
                f"got {name}={getattr(scheme, name):g}; {whole}"
            )
