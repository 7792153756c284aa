// MOSN cannot be installed by its module path alone: a main module's `replace` lines count, a dependency's do not.
module mosnbuild

go 1.18

require mosn.io/mosn v1.6.1

replace github.com/envoyproxy/go-control-plane => github.com/envoyproxy/go-control-plane v0.10.0

replace istio.io/api => istio.io/api v0.0.0-20211103171850-665ed2b92d52

// The helper of MOSN's seata filter is not served by the module proxy any more. The filter has to link, the Bolt
// path never calls it.
replace vimagination.zapto.org/byteio => ./byteio
