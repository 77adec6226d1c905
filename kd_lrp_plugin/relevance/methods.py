"""The methods by name: which rule at which layer."""

from dataclasses import dataclass

from kd_lrp_plugin.relevance.rules import Rule, epsilon, gamma, gradient, zplus
from kd_lrp_plugin.utils.registry import Registry


@dataclass(frozen=True)
class Method:
    """A named way to turn the factors at a layer into a map.

    Attributes:
        convolution: rule for convolutions, each with the batch norm behind it.
        linear: rule for linear layers.
        pooled: whether a channel's factor is averaged over the map first, as Grad-CAM does.
    """

    convolution: Rule
    linear: Rule
    pooled: bool = False

    @property
    def is_gradient(self) -> bool:
        """Whether the factors are plain gradients, for which every operation is allowed."""
        return self.convolution is gradient

    @property
    def needs_output(self) -> bool:
        """Whether a rule reads the layer's output, which must then be kept."""
        return not self.is_gradient


METHODS: Registry[Method] = Registry("method")
METHODS.register(Method(gradient, gradient, pooled=True), "grad_cam")
METHODS.register(Method(gradient, gradient), "gradient_activation")
METHODS.register(Method(epsilon, epsilon), "lrp_epsilon")
METHODS.register(Method(zplus, zplus), "lrp_zplus")
METHODS.register(Method(gamma, gamma), "lrp_gamma")
METHODS.register(Method(zplus, epsilon), "lrp_composite")
