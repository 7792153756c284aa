package com.alipay.sofa.rpc.core.request;

import java.util.Map;

/**
 * A stand-in with the class name that every Bolt implementation writes into a request.
 *
 * SOFARPC itself is not needed: the content is raw bytes and the header map is written by {@link interop.SofaSerializer}.
 */
public final class SofaRequest {
    public final Map<String, String> headers;
    public final byte[] content;

    public SofaRequest(Map<String, String> headers, byte[] content) {
        this.headers = headers;
        this.content = content;
    }
}
