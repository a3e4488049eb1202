"""What the page holds while it is open: models and substrate, each made when it is first needed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, get_args

from nacre.errors import CheckpointError, NacreError
from nacre.play.given import Given

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nacre.play.models import Depths, Mixtures
    from nacre.substrate import Substrate

T = TypeVar("T")
Method = Literal["PCA", "UMAP"]
"""How a map of the substrate is made."""


class Once(Generic[T]):
    """A value that is made at the first call, by one thread; an error is not kept."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: tuple[T] | None = None

    def __call__(self) -> T:
        """Return the value."""
        with self._lock:
            if self._made is None:
                self._made = (self._make(),)
            return self._made[0]


class Shown:
    """The parts of a page by what was given; importing this loads nothing slow."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.depths: Once[Depths] = Once(self._depths)
        self.mixtures: Once[Mixtures] = Once(self._mixtures)
        self.substrate: Once[tuple[Substrate, PreTrainedTokenizerBase]] = Once(self._substrate)
        self.maps = {method: Once(partial(self._map, method)) for method in get_args(Method)}

    @property
    def mixes(self) -> bool:
        """Whether there is something to compose."""
        return bool(self.given.compositions) or len(self.given.experts) > 1

    @property
    def ground(self) -> Path | None:
        """The folder whose substrate is shown."""
        return next(iter([*self.given.experts, *self.given.compositions]), None)

    def _depths(self) -> Depths:
        from nacre.play.models import Depths

        if self.given.model is None:
            raise CheckpointError("no run or checkpoint was given")
        return Depths(self.given.model)

    def _mixtures(self) -> Mixtures:
        from nacre.play.models import Mixtures

        return Mixtures(next(iter(self.given.compositions), None), self.given.experts)

    def _substrate(self) -> tuple[Substrate, PreTrainedTokenizerBase]:
        from nacre.play import substrate

        if self.ground is None:
            raise CheckpointError("nothing with a substrate was given")
        return substrate.load(self.ground)

    def _map(self, method: Method) -> str:
        from nacre.play import substrate

        return substrate.map_of(self.substrate()[0], method)

    def warm(self) -> None:
        """Load the models of all depths in the background; an error is said by who asks for one."""

        def work() -> None:
            with contextlib.suppress(NacreError):
                self.depths().load_all()

        threading.Thread(target=work, daemon=True).start()
