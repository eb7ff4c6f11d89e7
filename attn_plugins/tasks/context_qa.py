from attn_plugins.data.context_questions import question_rows
from attn_plugins.tasks import register_task
from attn_plugins.tasks.recall_task import RecallTask
from attn_plugins.tasks.ruler_rows import RulerConfig


@register_task("context-qa")
class ContextQA(RecallTask):
    """Questions whose answers stand in one of many passages of a long row: share of the answers' tokens that are right.

    RULER's questions over SQuAD, of your own data with a question, a context and an answer in each row; the other
    passages are contexts of other questions. ``exact`` is the share of rows whose whole answer is right, to the letter.
    """

    columns = ("question", "context", "answer")
    Config = RulerConfig

    def parts(self):
        return ("context-qa",)

    def maker(self, data, tokenizer):
        options = {name: getattr(self.config, name) for name in ("seed", "chat")}
        return lambda length: question_rows(data, tokenizer, length=length, count=self.config.rows, **options)
