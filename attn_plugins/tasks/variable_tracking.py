from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask
from attn_plugins.tasks.ruler_rows import RulerConfig, ruler_maker


@register_task("variable-tracking")
class VariableTracking(RecallTask):
    """Chains of assignments (VAR A = 12345, VAR B = VAR A) stand anywhere in a long text: which variables have a value?

    RULER's variable tracking, of your own text, after one short example: share of the letters' tokens that are right.
    """

    Config = RulerConfig

    def parts(self):
        return ("variable-tracking",)

    def maker(self, data, tokenizer):
        return ruler_maker(self, data, tokenizer)
