"""The frozen substrate: token strings in, a fixed vector for each out; numpy only, never torch."""

from __future__ import annotations

from nacre.substrate.codes import code_bits
from nacre.substrate.glyphs import Picture, TokenString
from nacre.substrate.show import blocks, nearest, picture, reconstruction, save_png
from nacre.substrate.table import Substrate, SubstrateRecipe, check_recipe

__all__ = [
    "Picture",
    "Substrate",
    "SubstrateRecipe",
    "TokenString",
    "blocks",
    "check_recipe",
    "code_bits",
    "nearest",
    "picture",
    "reconstruction",
    "save_png",
]
