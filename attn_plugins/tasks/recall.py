from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask


@register_task("recall")
class Recall(RecallTask):
    """Pass key and passage in the same rows, at the cost of one of them: the mean of both, and each in ``by_part``."""

    def parts(self):
        return ("passkey", "copy")
