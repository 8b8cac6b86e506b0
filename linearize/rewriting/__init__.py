"""Reading and editing `torch.fx` graphs; the only package that edits one."""
