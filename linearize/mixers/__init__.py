"""What an attention can become: one file a mixer, found by name in the registry."""

from __future__ import annotations

from linearize.mixers.base import Mixer, build_mixer, mixer_class, mixer_names, register_mixer
from linearize.mixers.citrus import Citrus
from linearize.mixers.deltanet import DeltaNet
from linearize.mixers.drop import Drop
from linearize.mixers.gated_deltanet import GatedDeltaNet
from linearize.mixers.gla import Gla
from linearize.mixers.keep import Keep
from linearize.mixers.liger import Liger
from linearize.mixers.lightning import Lightning
from linearize.mixers.lizard import Lizard
from linearize.mixers.lolcats import Lolcats
from linearize.mixers.mamba2 import Mamba2
from linearize.mixers.mixture import Mixture
from linearize.mixers.mla import MLA
from linearize.mixers.moa import Moa
from linearize.mixers.moments import Moments
from linearize.mixers.q_filters import QFilters
from linearize.mixers.share import Share
from linearize.mixers.slots import Slots
from linearize.mixers.streaming import Streaming
from linearize.mixers.window import Window

__all__ = [
    "MLA",
    "Citrus",
    "DeltaNet",
    "Drop",
    "GatedDeltaNet",
    "Gla",
    "Keep",
    "Liger",
    "Lightning",
    "Lizard",
    "Lolcats",
    "Mamba2",
    "Mixer",
    "Mixture",
    "Moa",
    "Moments",
    "QFilters",
    "Share",
    "Slots",
    "Streaming",
    "Window",
    "build_mixer",
    "mixer_class",
    "mixer_names",
    "register_mixer",
]
