"""MirrorLA: linear attention for vision whose features are reflected, not cut, into the non-negative orthant.

Importing it registers the variants with timm: `timm.create_model("mirrorla_tiny")`.
"""

from mirrorla.alignment import align_mirrors
from mirrorla.attention import MirrorAttention
from mirrorla.host_parts import HostConfig
from mirrorla.mirror_parameters import MirrorConfig
from mirrorla.pretrained import KeyReport, load_pretrained
from mirrorla.pyramid import MirrorPyramid
from mirrorla.variants import HOSTS, VARIANTS, create_backbone

__all__ = [
    "HOSTS",
    "VARIANTS",
    "HostConfig",
    "KeyReport",
    "MirrorAttention",
    "MirrorConfig",
    "MirrorPyramid",
    "align_mirrors",
    "create_backbone",
    "load_pretrained",
]
