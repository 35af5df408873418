# Fails if an object file defines a weak symbol: OBJECTS, read with NM.
foreach(object ${OBJECTS})
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [uvVwW] [^\n]*" weak "${symbols}")
  if(weak)
    message(SEND_ERROR "${object} defines ${weak}: give it the namespace of kernels/variant.h")
  endif()
endforeach()
