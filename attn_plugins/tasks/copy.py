from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask


@register_task("copy")
class Copy(RecallTask):
    """A natural passage of the text, again at the end: share of its tokens, from the ninth on, that are right.

    Some of them language alone can tell: the figure of a model without any memory is not 0 (SmolLM2-135M: about 0.37).
    """

    def parts(self):
        return ("copy",)
