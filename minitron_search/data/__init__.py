"""What models read: packed token windows and Winogrande questions."""
