"""The one place where tests meet an implementation. Return your own functions here, and run for example

    pytest tests/test_ce.py
"""
import mir
from methods import basic, ce, moca, vdep, vista


def next_token_loss(hidden_states, labels, head_weight, head_bias=None, **options):
    return ce.next_token_loss(hidden_states, labels, head_weight, head_bias, **options)


def reconstruction_loss(hidden_states, image_embeds, **options):
    return vdep.reconstruction_loss(hidden_states, image_embeds, **options)


def alignment_loss(text_embeds, text_mask, visual_state, **options):
    return vista.alignment_loss(text_embeds, text_mask, visual_state, **options)


def layer_weights(k, scheme="increasing"):
    return basic.layer_weights(k, scheme)


def supervision_degree(attention, text_mask):
    return basic.supervision_degree(attention, text_mask)


def direction_loss(v, v_hat, degree):
    return basic.direction_loss(v, v_hat, degree)


def semantic_loss(v, v_hat, degree, embedding, **options):
    return basic.semantic_loss(v, v_hat, degree, embedding, **options)


def make_moca(hidden_size):
    return moca.MoCa(hidden_size)


def frechet_distance(x, y, mode="exact"):
    return mir.frechet_distance(x, y, mode)


def modality_integration_rate(layers, mode="exact", outliers="median", normalise=True):
    return mir.modality_integration_rate(layers, mode, outliers, normalise)
