"""Nodes for ComfyUI: `DBCache` and `DBCacheSummary`.

Imports nothing of ComfyUI: a node is a class with certain attributes, and a model is changed by the
methods of the object that the node is given.
"""

from dbcache.integrations.comfyui.nodes import DBCache, DBCacheSummary

NODE_CLASS_MAPPINGS = {"DBCache": DBCache, "DBCacheSummary": DBCacheSummary}
NODE_DISPLAY_NAME_MAPPINGS = {"DBCache": "DBCache", "DBCacheSummary": "DBCache Summary"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
