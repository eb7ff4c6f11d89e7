from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask


@register_task("codes")
class Codes(RecallTask):
    """Eight lines such as "The code of river is 371.", one of which is asked for: share of its digits that are right.

    The hardest of the tasks of recall: SmolLM2-135M with its own attention has 0.83 to 0.89.
    """

    def parts(self):
        return ("codes",)
