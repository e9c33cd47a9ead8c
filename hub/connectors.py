"""The map between vision encoder and language model by its name, as in --connector and config.json.

    linear, mlp2x, mlp4x, …     N linear maps with GELU between them: model.Projector
    qformer, qformer-64         32 queries, 64 queries in the shape of BERT-base: methods/qformer.py
    qformer-4-96x2              4 queries, width 96, 2 layers
"""
import re
from typing import NamedTuple

from torch import nn

from common.flags import UserError
from methods.qformer import QFormer
from model import Projector, VisionConfig

NUMBER = r"([1-9]\d{0,4})"
NAME = re.compile(rf"linear|mlp{NUMBER}x(?:_gelu)?|qformer(?:-{NUMBER})?(?:-{NUMBER}x{NUMBER})?")


class Connector(NamedTuple):
    maps: int                   # linear maps of an MLP; 0: a Q-Former of the shape below
    queries: int = 32
    width: int = 768
    layers: int = 12


def read_connector(name: str) -> Connector:
    """Return what a name means. Raises UserError for one that is not known."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(f"connector {name[:60]!r} is not known: say linear, mlp2x (or another number "
                        "of maps), qformer, qformer-64 (queries) or qformer-64-768x12 (queries, "
                        "width, layers)")
    maps, queries, width, layers = [int(n or 0) for n in found.groups()]
    if maps > 100 or queries > 1 << 14 or width > 1 << 14 or layers > 1000:
        raise UserError(f"connector {name!r} is larger than any model's")
    if name.startswith("qformer"):
        return Connector(0, queries or 32, width or 768, layers or 12)
    return Connector(maps or 1)


def make_connector(name: str, vision_size: int, hidden_size: int) -> nn.Module:
    c = read_connector(name)
    if c.maps:
        return Projector(vision_size, hidden_size, c.maps)
    return QFormer(vision_size, hidden_size, c.queries, c.width, c.layers)


def image_tokens(name: str, vision: VisionConfig) -> int:
    """Return how many image tokens a connector makes of an image."""
    c = read_connector(name)
    return vision.image_tokens if c.maps else c.queries


def name_of(connector: nn.Module) -> str:
    """Return the name under which a checkpoint stores a connector."""
    if isinstance(connector, QFormer):
        _, queries, width = connector.query_tokens.shape
        return f"qformer-{queries}-{width}x{len(connector.bert['encoder']['layer'])}"
    maps = len(list(connector.children()))
    return f"mlp{maps}x" if maps > 1 else "linear"


def configured(c: dict) -> str:
    """Return the connector's name in a config.json: ours, LLaVA's or TinyLLaVA's; else mlp2x."""
    name = c.get("connector", c.get("connector_type", c.get("mm_projector_type"))) or "mlp2x"
    if name == "qformer" and "num_queries" in c:
        return f"qformer-{c['num_queries']}"
    return name
