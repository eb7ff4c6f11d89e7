from attn_plugins.data.ruler import RULER
from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask
from attn_plugins.tasks.ruler_rows import RulerConfig, ruler_maker


@register_task("ruler")
class Ruler(RecallTask):
    """Numbers, variables and common words in long texts: the mean of four tasks, each in ``by_part``, in its own rows.

    These are multikey, multiquery, variable-tracking and common-words. After RULER (Hsieh et al. 2024,
    arXiv:2404.06654), of your own text; what differs from it stands in :mod:`attn_plugins.data.ruler`.
    """

    Config = RulerConfig

    def parts(self):
        return tuple(RULER)

    def maker(self, data, tokenizer):
        return ruler_maker(self, data, tokenizer)
