"""How a report is put on a page: cards, palette, formats, tables, static figures."""
