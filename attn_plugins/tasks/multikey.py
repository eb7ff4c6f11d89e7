from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask
from attn_plugins.tasks.ruler_rows import RulerConfig, ruler_maker


@register_task("multikey")
class Multikey(RecallTask):
    """One of several numbers that stand anywhere in a long text, each with a word that it belongs to, is asked for.

    RULER's needle with several keys, of your own text: share of the number's digits that are right.
    """

    Config = RulerConfig

    def parts(self):
        return ("multikey",)

    def maker(self, data, tokenizer):
        return ruler_maker(self, data, tokenizer)
