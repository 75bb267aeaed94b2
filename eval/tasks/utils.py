"""What lmms-eval's own tasks of the same layout do with a row."""

from lmms_eval.tasks.mmvp.utils import (  # noqa: F401
    mmvp_aggregate_pair_results,
    mmvp_aggregate_results,
    mmvp_doc_to_target,
    mmvp_doc_to_text,
    mmvp_doc_to_visual,
    mmvp_process_results,
)
from lmms_eval.tasks.pope.utils import (  # noqa: F401
    pope_aggregate_accuracy,
    pope_aggregate_f1_score,
    pope_aggregate_precision,
    pope_aggregate_recall,
    pope_aggregate_yes_ratio,
    pope_doc_to_text,
    pope_doc_to_visual,
    pope_process_results,
)
