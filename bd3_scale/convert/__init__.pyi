from bd3_scale.convert.export import plan_export as plan_export
from bd3_scale.convert.export import run_export as run_export
from bd3_scale.convert.importer import plan_import as plan_import
from bd3_scale.convert.importer import run_import as run_import
from bd3_scale.convert.quantize import run_quantize as run_quantize
