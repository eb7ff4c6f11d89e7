from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask
from attn_plugins.tasks.ruler_rows import RulerConfig, ruler_maker


@register_task("multiquery")
class Multiquery(RecallTask):
    """All of several numbers that stand anywhere in a long text, each with a word that it belongs to, are asked for.

    RULER's needle with several queries, of your own text: share of the numbers' digits that are right.
    """

    Config = RulerConfig

    def parts(self):
        return ("multiquery",)

    def maker(self, data, tokenizer):
        return ruler_maker(self, data, tokenizer)
