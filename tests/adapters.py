"""What a course's tests talk to: to have your own version tested, return it here instead of ours."""
import mir
from methods import ce


def next_token_loss(hidden_states, labels, head_weight, head_bias=None, **options):
    return ce.next_token_loss(hidden_states, labels, head_weight, head_bias, **options)


def frechet_distance(x, y):
    return mir.frechet_distance(x, y)


def modality_integration_rate(layers, outliers="median"):
    return mir.modality_integration_rate(layers, outliers=outliers)
