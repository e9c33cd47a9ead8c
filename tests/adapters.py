"""What a course's tests talk to: to have your own version tested, return it here instead of ours."""
import mir
from methods import ce


def next_token_loss(hidden_states, labels, head_weight, head_bias=None, **options):
    return ce.next_token_loss(hidden_states, labels, head_weight, head_bias, **options)


def frechet_distance(x, y, mode="exact"):
    return mir.frechet_distance(x, y, mode)


def modality_integration_rate(layers, mode="exact", outliers="median", normalise=True):
    return mir.modality_integration_rate(layers, mode, outliers, normalise)
