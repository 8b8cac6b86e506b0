"""What an attention can become: one file a mixer, found by name in the registry."""

from __future__ import annotations

from linearize.mixers.base import Mixer, build_mixer, mixer_class, mixer_names, register_mixer
from linearize.mixers.keep import Keep
from linearize.mixers.lizard import Lizard
from linearize.mixers.lolcats import Lolcats
from linearize.mixers.mla import MLA
from linearize.mixers.window import Window

__all__ = [
    "MLA",
    "Keep",
    "Lizard",
    "Lolcats",
    "Mixer",
    "Window",
    "build_mixer",
    "mixer_class",
    "mixer_names",
    "register_mixer",
]
