"""The six rules by hand, in plain NumPy: what one writes without fusestep.

As fast as element-wise NumPy goes: in place, with no temporary array. Hyper-parameters but the
learning rate are the defaults of fusestep and PyTorch. The order of the operations is fusestep's,
so the results agree to the last bit or nearly so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .network import Array, Arrays


class Plain:
    """What the rules have in common.

    Parameters
    ----------
    params
        Arrays to update in place.
    lr
        Learning rate.
    """

    def __init__(self, params: Arrays, lr: float) -> None:
        self.params = params
        self.lr = lr
        self.steps = 0
        self.buffer = _zeros_like(params)
        """Room for intermediate results, so that a step allocates nothing."""

    def step(self, grads: Arrays) -> None:
        """Update the parameters in place."""
        self.steps += 1
        self.prepare()
        for name, param in self.params.items():
            self.update(name, param, grads[name])

    def prepare(self) -> None:
        """Work out what is the same for all parameters of a step."""

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        raise NotImplementedError


class SGD(Plain):
    """Stochastic gradient descent."""

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        move = self.buffer[name]
        np.multiply(grad, self.lr, out=move)
        param -= move


class NAG(Plain):
    """Nesterov's accelerated gradient."""

    momentum = 0.9

    def __init__(self, params: Arrays, lr: float) -> None:
        super().__init__(params, lr)
        self.velocity = _zeros_like(params)

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        velocity, move = self.velocity[name], self.buffer[name]
        velocity *= self.momentum
        velocity += grad
        np.multiply(velocity, self.momentum, out=move)
        move += grad
        move *= self.lr
        param -= move


class Adagrad(Plain):
    """Adagrad."""

    eps = 1e-10

    def __init__(self, params: Arrays, lr: float) -> None:
        super().__init__(params, lr)
        self.sum = _zeros_like(params)

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        total, move = self.sum[name], self.buffer[name]
        np.multiply(grad, grad, out=move)
        total += move
        np.sqrt(total, out=move)
        move += self.eps
        np.divide(grad, move, out=move)
        move *= self.lr
        param -= move


class Adam(Plain):
    """Adam, with both bias corrections moved out of the loop over the elements."""

    beta1, beta2 = 0.9, 0.999
    eps = 1e-8

    def __init__(self, params: Arrays, lr: float) -> None:
        super().__init__(params, lr)
        self.exp_avg = _zeros_like(params)
        self.exp_avg_sq = _zeros_like(params)

    def prepare(self) -> None:
        """Work out the bias corrections."""
        correction = math.sqrt(1 - self.beta2**self.steps)
        self.step_size = self.lr * correction / (1 - self.beta1**self.steps)
        self.scaled_eps = self.eps * correction

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        m, v, move = self.exp_avg[name], self.exp_avg_sq[name], self.buffer[name]
        self.update_moments(m, v, grad, move)
        np.sqrt(v, out=move)
        move += self.scaled_eps
        np.divide(m, move, out=move)
        move *= self.step_size
        param -= move

    def update_moments(self, m: Array, v: Array, grad: Array, buffer: Array) -> None:
        """Update the moving averages of the gradient and of its square."""
        # a + (1 - beta) (x - a), not beta a + (1 - beta) x: rounded to float32, 0.999 and 0.001 do
        # not add up to 1, and v would be off by a little more every step.
        np.subtract(grad, m, out=buffer)
        buffer *= 1 - self.beta1
        m += buffer
        np.multiply(grad, grad, out=buffer)
        buffer -= v
        buffer *= 1 - self.beta2
        v += buffer


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    weight_decay = 1e-2

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        decay = self.buffer[name]
        # Not param *= 1 - ...: rounding that factor to float32 errs the same way every step.
        np.multiply(param, self.lr * self.weight_decay, out=decay)
        param -= decay
        super().update(name, param, grad)


class NAdam(Adam):
    """Adam with Nesterov momentum."""

    momentum_decay = 4e-3

    def __init__(self, params: Arrays, lr: float) -> None:
        super().__init__(params, lr)
        self.other_buffer = _zeros_like(params)
        self.momentum_product = 1.0

    def prepare(self) -> None:
        """Work out the bias corrections and how much the gradient and its average weigh."""
        super().prepare()
        now, following = self.momentum(self.steps), self.momentum(self.steps + 1)
        self.momentum_product *= now
        rate = self.lr * math.sqrt(1 - self.beta2**self.steps)
        self.grad_weight = rate * (1 - now) / (1 - self.momentum_product)
        self.average_weight = rate * following / (1 - self.momentum_product * following)

    def momentum(self, step: int) -> float:
        """Return the momentum of a step, which grows towards beta1."""
        return self.beta1 * (1 - 0.5 * math.pow(0.96, step * self.momentum_decay))

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Update one parameter."""
        m, v, move = self.exp_avg[name], self.exp_avg_sq[name], self.buffer[name]
        other = self.other_buffer[name]
        self.update_moments(m, v, grad, move)
        np.multiply(grad, self.grad_weight, out=move)
        np.multiply(m, self.average_weight, out=other)
        move += other
        np.sqrt(v, out=other)
        other += self.scaled_eps
        move /= other
        param -= move


def _zeros_like(params: Arrays) -> Arrays:
    return {name: np.zeros_like(param) for name, param in params.items()}
