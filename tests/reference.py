"""The rules in float64 NumPy, written from the papers, with nothing in common with the kernels.

Each function takes the parameter, the gradient and a dict of state (empty before the first step),
and returns the new parameter. Bias corrections stand where the paper has them.
"""

from __future__ import annotations

import numpy as np


def sgd(w, g, state, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    """Sutskever et al. (2013), equations 1-4, in the form of torch.optim.SGD."""
    g = g + weight_decay * w
    if momentum:
        if "momentum_buffer" in state:
            b = momentum * state["momentum_buffer"] + (1 - dampening) * g
        else:
            b = g
        state["momentum_buffer"] = b
        g = g + momentum * b if nesterov else b
    return w - lr * g


def nag(w, g, state, *, lr, momentum=0.9, weight_decay=0.0):
    """Nesterov's accelerated gradient."""
    return sgd(w, g, state, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True)


def _moments(g, state, betas):
    beta1, beta2 = betas
    state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    state["step"] = state.get("step", 0) + 1
    return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _decay(w, g, lr, weight_decay, decoupled):
    return (w - lr * weight_decay * w, g) if decoupled else (w, g + weight_decay * w)


def adam(
    w,
    g,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    decoupled_weight_decay=False,
):
    """Kingma & Ba (2015), Algorithm 1; Reddi et al. (2018), Algorithm 2."""
    w, g = _decay(w, g, lr, weight_decay, decoupled_weight_decay)
    m, v, t = _moments(g, state, betas)
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0.0), v)
    m_hat = m / (1 - betas[0] ** t)
    v_hat = v / (1 - betas[1] ** t)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps)


def adamw(w, g, state, *, lr, weight_decay=1e-2, **options):
    """Loshchilov & Hutter (2019), Algorithm 2."""
    return adam(
        w, g, state, lr=lr, weight_decay=weight_decay, decoupled_weight_decay=True, **options
    )


def nadam(
    w,
    g,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
):
    """Dozat (2016), Algorithm 2."""
    w, g = _decay(w, g, lr, weight_decay, decoupled_weight_decay)
    m, v, t = _moments(g, state, betas)
    mu = betas[0] * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = state["mu_product"] = state.get("mu_product", 1.0) * mu
    m_bar = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
    return w - lr * m_bar / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def adagrad(
    w, g, state, *, lr, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10
):
    """Duchi et al. (2011), Figure 1, diagonal."""
    g = g + weight_decay * w
    t = state["step"] = state.get("step", 0) + 1
    s = state["sum"] = state.get("sum", initial_accumulator_value) + g**2
    return w - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s) + eps)


def rowwise_adagrad(w, g, state, *, lr, eps=1e-10, weight_decay=0.0):
    """Mudigere et al. (2022), section 4.1.4: Adagrad with the mean square of a row's gradients."""
    g = g + weight_decay * w
    rest = tuple(range(1, np.ndim(g)))
    s = state["sum"] = state.get("sum", 0.0) + np.mean(g**2, axis=rest, keepdims=True)
    state["step"] = state.get("step", 0) + 1
    return w - lr * g / (np.sqrt(s) + eps)
