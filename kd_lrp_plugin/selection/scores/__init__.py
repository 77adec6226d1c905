r"""Scores of untrained students against a teacher: the lower, the better.

Each is a function of two observations on the same images, registered in :data:`SCORES` with what
it needs: how the networks are initialised, and in which mode they run. An observation computes
what a score asks for once, so that the teacher's side is computed once for all candidates.

======================  ===========================================================================
score                   what it is
======================  ===========================================================================
``diswot``              Grad-CAM correlations by L2 + feature relations by L2; its parts are
                        ``gradcam_l2`` and ``relation_l2`` (DisWOT, eq. 2.10-2.13 of the thesis)
``diswot_lrp_cosine``   relevance by cosine + feature relations by cosine; its parts are
                        ``lrp_cosine`` and ``relation_cosine`` (the thesis, eq. 2.21-2.27)
``diswot_reference``    the formula of DisWOT's published code; its parts are
                        ``reference_semantic`` and ``reference_relation``
``reference_exact``     the same with rows normalised exactly, however short they are
``parameters``,         size and cost, negated: the bigger, the better. What any claim must beat.
``macs``
``nwot``, ``synflow``,  baselines that see no teacher
``bn_log_variance``
======================  ===========================================================================
"""

from kd_lrp_plugin.selection.scores import baselines, diswot, reference

__all__ = ["baselines", "diswot", "reference"]
