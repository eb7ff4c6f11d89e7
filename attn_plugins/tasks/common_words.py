from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask
from attn_plugins.tasks.ruler_rows import RulerConfig, ruler_maker


@register_task("common-words")
class CommonWords(RecallTask):
    """The three most common words of a long list of words of the text, the most common one first.

    As RULER's extraction of common and of frequent words: share of the words' tokens that are right.
    """

    Config = RulerConfig

    def parts(self):
        return ("common-words",)

    def maker(self, data, tokenizer):
        return ruler_maker(self, data, tokenizer)
