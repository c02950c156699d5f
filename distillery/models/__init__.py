"""Teachers and students from timm, torchvision and torch.hub, and the view that both see."""
