from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask


@register_task("passkey")
class Passkey(RecallTask):
    """A pass key of seven digits, told at the beginning, asked for at the end: share of its digits that are right."""

    def parts(self):
        return ("passkey",)
