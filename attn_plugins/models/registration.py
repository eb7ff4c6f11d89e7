"""The recurrent models among those that transformers' auto classes know."""


def register_configs() -> None:
    """To be called when the auto class of configs is there."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from attn_plugins.models import configs

    for cls in (configs.RecurrentEncoderConfig, configs.RecurrentDecoderConfig, configs.RecurrentSeq2SeqConfig):
        AutoConfig.register(cls.model_type, cls, exist_ok=True)


def register_models() -> None:
    """To be called when the auto classes of models are there."""
    from transformers.models.auto import modeling_auto as auto

    from attn_plugins.models.configs import RecurrentDecoderConfig, RecurrentEncoderConfig, RecurrentSeq2SeqConfig
    from attn_plugins.models.decoder import RecurrentDecoder
    from attn_plugins.models.encoder import RecurrentEncoderForSequenceClassification, RecurrentEncoderModel
    from attn_plugins.models.seq2seq import RecurrentSeq2Seq

    auto.AutoModel.register(RecurrentEncoderConfig, RecurrentEncoderModel, exist_ok=True)
    auto.AutoModel.register(RecurrentDecoderConfig, RecurrentDecoder, exist_ok=True)
    auto.AutoModel.register(RecurrentSeq2SeqConfig, RecurrentSeq2Seq, exist_ok=True)
    classes = RecurrentEncoderConfig, RecurrentEncoderForSequenceClassification
    auto.AutoModelForSequenceClassification.register(*classes, exist_ok=True)
    auto.AutoModelForCausalLM.register(RecurrentDecoderConfig, RecurrentDecoder, exist_ok=True)
    auto.AutoModelForSeq2SeqLM.register(RecurrentSeq2SeqConfig, RecurrentSeq2Seq, exist_ok=True)
