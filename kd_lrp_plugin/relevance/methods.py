"""The methods by name: which rule at which layer.

A rule and a method of your own, in a module of your own, are two calls. Import the module (in
YAML: name it under ``dependencies``) before the name is used::

    from kd_lrp_plugin.relevance.methods import METHODS, Method
    from kd_lrp_plugin.relevance.rules import RULES, epsilon, stabilize

    @RULES.register
    def absolute(g, x, y, w, layer):
        total = layer.apply(x.abs(), w.abs())
        return x.sign() * layer.transpose(g * (y / stabilize(total)), w.abs())

    METHODS.register(Method(convolution=absolute, linear=epsilon), "lrp_absolute")

:mod:`kd_lrp_plugin.relevance.rules` says what a rule gets and returns.
"""

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
        through_weights: whether relevance flows through the weights of an attention, too, to its
            queries and keys (AttnLRP); otherwise they are factors, and it flows through the values
            alone (CP-LRP, Ali et al., ICML 2022). Plain gradients flow everywhere.
    """

    convolution: Rule
    linear: Rule
    pooled: bool = False
    through_weights: bool = False

    @property
    def is_gradient(self) -> bool:
        """Whether the factors are plain gradients, for which every operation is allowed."""
        return self.convolution is gradient and self.linear is gradient

    @property
    def is_grad_cam(self) -> bool:
        """Whether the channels' weights are plain gradients, so that no layer has a rule."""
        return self.is_gradient and self.pooled

    @property
    def has_spikes(self) -> bool:
        """Whether the derivative of its maps jumps wherever the output of a convolution nears 0."""
        return self.convolution is epsilon

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
METHODS.register(Method(epsilon, epsilon, through_weights=True), "attn_lrp")
