def write_page(known, folder): pass
