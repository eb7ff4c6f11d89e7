from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.text_to_text import TextToText


@register_task("translation")
class Translation(TextToText, TrainableTask):
    """BLEU and chrF, 0 to 100, of what a model writes for each source, by sacrebleu over all rows at once."""

    metric, pipeline_tag = "sacrebleu", "translation"
    metrics = ("sacrebleu", "chrf")

    def asks(self):
        if self.config.source_lang or self.config.target_lang:
            return "{source_lang}:\n{source}\n\n{target_lang}:\n"
        return "{source}\n\nTranslation:\n"
