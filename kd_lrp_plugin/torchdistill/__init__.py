"""What torchdistill's YAML can name once ``dependencies`` lists this module.

=====================  ==========================================================================
where in YAML          names
=====================  ==========================================================================
forward procedures     by ``!import_call`` of :func:`recorder`; ``forward_with_companions``
mid-level losses       ``LRPSemanticCosineLoss``, ``LRPSemanticL2Loss``, ``LRPRelativeL2Loss``
                       (``target: label | teacher | contrast``, ``signed``, ``every``);
                       ``GradCAML2Loss``, ``GradCAMCosineLoss`` (``target``, ``every``);
                       ``RelationCosineLoss``, ``RelationL2Loss`` (``every``);
                       ``RightReasonsLoss`` (``target``, ``every``), of the student alone;
                       ``GroupDROLoss`` (``dataset``, ``step_size``);
                       ``ProbeKLLoss`` (``probes``, ``temperature``);
                       ``SubclassKDLoss`` (``temperature``, ``distance_weights``),
                       ``SubclassCrossEntropyLoss`` (``dataset``),
                       ``SubclassAuxiliaryLoss`` (``temperature``)
high-level loss        ``DisWOTPlusLoss``, with ``balance: gradient`` or without; its
                       ``class_weights`` by ``!import_call`` of :func:`class_weights`
auxiliary wrapper      ``ModelWithHeads``, for hints (``Conv2d``) and probes (``linear_probe``)
pre-epoch processes    by ``!import_call`` of :func:`weight_schedule`
collate functions      by ``!import_call`` of :func:`mixup`
models                 ``timm_model``, ``timm_mobilenetv2``, ``ofa_595``; ``mnist_cnn``,
                       ``mnist_mlp``, ``mnist_assistant``, ``mnist_assistant_small`` for 28 px;
                       and ``diswot_student``, which chooses one
datasets               ``phantom``, ``folder_images``, ``csv_images``, ``mnist``; ``marked``, which
                       puts markers on any of them, ``subclasses``, which labels any by
                       subclass, their own or, by :func:`kmeans_subclasses`, those of a model's
                       features, and ``with_unlabelled``, which adds images without a label; in
                       ``datasets`` by ``!import_call`` of :func:`phantom` and so on
data set wrappers      ``companions`` (``clean``, ``mask``, ``group``), which add to each image
=====================  ==========================================================================

The mid-level losses stand beside torchdistill's own in one ``WeightedSumLoss``: the recorder takes
the place of ``forward_batch_only``, and ``forward_hook`` serves the others as ever:

.. code-block:: yaml

    student:
      forward_proc: !import_call
        key: kd_lrp_plugin.torchdistill.recorder
        init: {kwargs: {layers: auto, method: gradient_activation}}
      forward_hook: {input: [], output: [layer3]}  # for ATLoss
    criterion:
      key: WeightedSumLoss
      kwargs:
        sub_terms:
          at: {criterion: {key: ATLoss, kwargs: ...}, weight: 1000.0}
          maps:
            criterion: {key: LRPRelativeL2Loss, kwargs: {signed: True, target: contrast}}
            weight: 0.97

A module of your own, named in ``dependencies``, adds to this: :func:`register_recorded_loss` makes
a mid-level loss of a distance, :func:`recorded` gives any loss the recording and :func:`companion`
what ``companions`` adds, and a method that is registered in
:data:`kd_lrp_plugin.relevance.methods.METHODS` is one for the recorder and the losses.
``examples/extension`` shows all of it but companions.

Everything here is a thin shell around the core, and takes exactly the keywords that it lists:
torchdistill itself would drop a misspelled one without a word.
"""

from kd_lrp_plugin.torchdistill.clusters import kmeans_subclasses
from kd_lrp_plugin.torchdistill.collate import mixup
from kd_lrp_plugin.torchdistill.datasets import (
    class_weights,
    companions,
    csv_images,
    folder_images,
    marked,
    mnist,
    phantom,
    subclasses,
    with_unlabelled,
)
from kd_lrp_plugin.torchdistill.forward_proc import companion, recorded, recorder
from kd_lrp_plugin.torchdistill.group_dro import GroupDROLoss
from kd_lrp_plugin.torchdistill.heads import ModelWithHeads, ProbeKLLoss, linear_probe
from kd_lrp_plugin.torchdistill.high_level import DisWOTPlusLoss, check_finite
from kd_lrp_plugin.torchdistill.mid_level import (
    COMPARISONS,
    Comparison,
    RecordedLoss,
    register_recorded_loss,
)
from kd_lrp_plugin.torchdistill.models import (
    diswot_student,
    mnist_assistant,
    mnist_assistant_small,
    mnist_cnn,
    mnist_mlp,
    ofa_595,
    timm_mobilenetv2,
    timm_model,
)
from kd_lrp_plugin.torchdistill.pre_epoch_proc import weight_schedule
from kd_lrp_plugin.torchdistill.right_reasons import RightReasonsLoss
from kd_lrp_plugin.torchdistill.subclass import (
    SubclassAuxiliaryLoss,
    SubclassCrossEntropyLoss,
    SubclassKDLoss,
)

__all__ = [
    "COMPARISONS",
    "Comparison",
    "DisWOTPlusLoss",
    "GroupDROLoss",
    "ModelWithHeads",
    "ProbeKLLoss",
    "RecordedLoss",
    "RightReasonsLoss",
    "SubclassAuxiliaryLoss",
    "SubclassCrossEntropyLoss",
    "SubclassKDLoss",
    "check_finite",
    "class_weights",
    "companion",
    "companions",
    "csv_images",
    "diswot_student",
    "folder_images",
    "kmeans_subclasses",
    "linear_probe",
    "marked",
    "mixup",
    "mnist",
    "mnist_assistant",
    "mnist_assistant_small",
    "mnist_cnn",
    "mnist_mlp",
    "ofa_595",
    "phantom",
    "recorded",
    "recorder",
    "register_recorded_loss",
    "subclasses",
    "timm_mobilenetv2",
    "timm_model",
    "weight_schedule",
    "with_unlabelled",
]
