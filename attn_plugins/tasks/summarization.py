from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.text_to_text import TextToText


@register_task("summarization")
class Summarization(TextToText, TrainableTask):
    """ROUGE-1, 2 and L, 0 to 1, of what a model writes for each source, by rouge-score: the mean of the rows."""

    metric, pipeline_tag = "rougeL", "summarization"
    metrics = ("rouge",)

    def asks(self):
        return "{source}\n\nSummary:\n"
