"""Ray drives no ranks here; these names of cache-dit tell what to use instead."""

from dbcache.refused import disable_ray_module_parallelism as disable_ray_module_parallelism
from dbcache.refused import disable_ray_pipeline_parallelism as disable_ray_pipeline_parallelism
from dbcache.refused import enable_ray_module_parallelism as enable_ray_module_parallelism
from dbcache.refused import enable_ray_parallelism as enable_ray_parallelism
from dbcache.refused import enable_ray_pipeline_parallelism as enable_ray_pipeline_parallelism
