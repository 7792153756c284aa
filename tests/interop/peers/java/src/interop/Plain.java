package interop;

import java.io.Serializable;

/** What Java peers say to one another with Bolt's default serializer and no header section at all. */
final class Plain {
    private Plain() {}

    /** A client's question, or its oneway note. */
    static final class Ask implements Serializable {
        private static final long serialVersionUID = 1;
        String caller;
        boolean note;
        /** Whether the server shall call the client before it answers. */
        boolean callBack;
        byte[] data;
    }

    static final class Answer implements Serializable {
        private static final long serialVersionUID = 1;
        /** The client that answered the server's own call, or null when there was none. */
        String calledBack;
        byte[] data;
    }

    /** The server's own request, on the connection that a client opened. */
    static final class Call implements Serializable {
        private static final long serialVersionUID = 1;
        byte[] data;
    }

    static final class CallAnswer implements Serializable {
        private static final long serialVersionUID = 1;
        String client;
        byte[] data;
    }
}
