from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask


@register_task("names")
class Names(RecallTask):
    """A dictionary of six lines such as "A: apple", again at the end: share of its words that are right.

    The first line is given, so that the form is known.
    """

    def parts(self):
        return ("names",)
