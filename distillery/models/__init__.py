"""Teachers and students from timm, torchvision and torch.hub, and the augmented view that both receive."""
